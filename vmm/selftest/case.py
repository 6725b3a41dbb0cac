"""What a case is, and the cell of the matrix that it runs in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from kvm_bindings import Vm, ioctls
from vmm.conversion.making import make_backing
from vmm.conversion.matrix import UNTOLD
from vmm.core.ranges import Range
from vmm.memory.backing import Backing
from vmm.selftest.entries import Combination
from vmm.selftest.platform import Platform
from vmm.selftest.rig import Rig


class Failed(AssertionError):
    """The host (or pyvmm on it) behaves otherwise; the text says how."""


class Skipped(Exception):
    """The case says nothing in this cell; the text says why."""


class Cell:
    """A scheme and a backing on a platform. What cases open in it is closed with it."""

    def __init__(
        self,
        platform: Platform,
        combination: Combination,
        *,
        watch: Callable[[Backing], Backing] = lambda backing: backing,
    ) -> None:
        """`watch` sees each backing before a rig uses it."""
        self.platform = platform
        self.combination = combination
        self._watch = watch
        self._rigs: list[Rig] = []
        self._opened = ExitStack()

    def rig(self, **options: Any) -> Rig:
        """A rig of this cell, with Rig's options; closed when the case is over.

        Raises Skipped where the host has no part in conversions: `protected` is for these.
        """
        if self.combination.scheme in UNTOLD:
            raise Skipped("the guest converts its pages itself, and the host is not told")
        return self._rig(**options)

    def protected(self, **options: Any) -> Rig:
        """A rig whose guest converts its pages itself. Raises Skipped where the host does it."""
        if self.combination.scheme not in UNTOLD:
            raise Skipped("only where the guest converts pages without the host (pkvm)")
        return self._rig(**options)

    def _rig(self, **options: Any) -> Rig:
        wrap = options.pop("wrap", lambda backing: backing)
        options["wrap"] = lambda backing: wrap(self._watch(backing))
        rig = self._opened.enter_context(Rig(self.platform, self.combination, **options))
        self._rigs.append(rig)
        return rig

    def vm(self) -> Vm:
        """A bare VM of the scheme's type."""
        vm = self.platform.system.create_vm(self.platform.vm_type(self.combination.scheme))
        return self._opened.enter_context(vm)

    @property
    def is_modelled(self) -> bool:
        """Whether this is no real kernel: files are then ordinary ones underneath."""
        return self.platform.is_modelled

    def backing(self, vm: Vm, size: int) -> Backing:
        """Another backing of the cell's kind."""
        made = make_backing(vm, self.combination.backing, size)
        self.closing(made.close)
        return made

    def make_private(self, vm: Vm, area: Range) -> None:
        """Set the attribute, where KVM keeps the state of each page in one."""
        if self.combination.scheme == "attributes":
            vm.set_memory_attributes(area.start, area.size, ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE)

    def stack(self) -> ExitStack:
        """What is put on it is closed when the case is over."""
        return self._opened.enter_context(ExitStack())

    def closing(self, close: Callable[[], object]) -> None:
        """Call `close` when the case is over."""
        self._opened.callback(close)

    def interrupt(self) -> None:
        """Stop every guest; from any thread."""
        for rig in list(self._rigs):
            rig.interrupt()

    def close(self) -> None:
        """Close what the case opened; the cell may be used again."""
        self._rigs.clear()
        self._opened.close()


class Case(NamedTuple):
    """One behaviour. `run` raises Failed or Skipped, or returns."""

    name: str
    title: str
    run: Callable[[Cell], None]


CASES: list[Case] = []


def case(title: str) -> Callable[[Callable[[Cell], None]], Callable[[Cell], None]]:
    """Make a function a case, in the order of the source. `title` is a statement that holds."""

    def register(run: Callable[[Cell], None]) -> Callable[[Cell], None]:
        room = run.__module__.rpartition(".")[2]
        CASES.append(Case(f"{room}.{run.__name__}", title, run))
        return run

    return register


def expect(what: str, found: object, wanted: object) -> None:
    """Raise Failed unless both are equal."""
    if found != wanted:
        raise Failed(f"{what}: {_word(found)} instead of {_word(wanted)}")


def expect_error(what: str, call: Callable[[], object], *numbers: int) -> None:
    """Raise Failed unless `call` fails with one of the errnos (any errno if none is named)."""
    import errno

    try:
        call()
    except OSError as error:
        if not numbers or error.errno in numbers:
            return
        names = "/".join(errno.errorcode[number] for number in numbers)
        found = errno.errorcode.get(error.errno or 0, str(error.errno))
        raise Failed(f"{what}: {found} instead of {names}") from None
    raise Failed(f"{what}: went through instead of being refused")


def _word(value: object) -> str:
    return f"{value:#x}" if type(value) is int and abs(value) > 9 else f"{value}"
