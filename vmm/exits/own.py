"""Exit handlers of the user's own, before or in the place of pyvmm's."""

from __future__ import annotations

from collections.abc import Sequence

from kvm_bindings import exits as kvm_exits
from vmm.core.lean_typing import Any
from vmm.core.own_code import ExtensionError, called
from vmm.exits.handlers import Handler, Table


class ExitHandler:
    """Sees the exits of some classes (kvm_bindings.exits has them all) before pyvmm does.

        class Msrs(vmm.ExitHandler):
            exits = (kvm_bindings.exits.RdmsrExit,)

            def handle(self, vcpu: Any, exit: Any) -> bool:
                if exit.msr != 0x1234:
                    return False  # pyvmm's own handler has it
                vcpu.answer_msr(42, known=True)
                return True

    What `handle` raises ends the run, as a policy's error does.
    """

    exits: Sequence[type[Any]] = ()
    """The classes of exits."""
    hypercalls: Sequence[int] = ()
    """Of HypercallExits only these numbers; empty: all that KVM passes on. That is
    KVM_HC_MAP_GPA_RANGE (12) on x86, and the RSI functions of a realm on arm64."""

    def handle(self, vcpu: Any, exit: Any) -> bool:
        """On the vCPU's thread, the guest waits: whether the exit is dealt with. `vcpu` is
        kvm_bindings' Vcpu, with `index` and its `answer_*` methods."""
        raise NotImplementedError


def with_own(table: Table, handlers: Sequence[ExitHandler]) -> Table:
    """`table` with the user's handlers in front, the first of them first."""
    result = dict(table)
    for own in reversed(handlers):
        for kind in _classes(own):
            name, ours = result.get(kind, (kind.__name__.removesuffix("Exit").lower(), None))
            result[kind] = (name, _in_front(own, kind, ours))
    return result


def _classes(own: ExitHandler) -> list[type[Any]]:
    hypercalls = [kvm_exits.HypercallExit] if own.hypercalls else []
    return list(dict.fromkeys([*own.exits, *hypercalls]))


def _in_front(own: ExitHandler, kind: type[Any], ours: Handler | None) -> Handler:
    numbers = frozenset(own.hypercalls) if kind is kvm_exits.HypercallExit else frozenset()

    def handle(vcpu: Any, exit: Any) -> None:
        if not numbers or exit.number in numbers:
            done = called(own, "handle", own.handle, vcpu, exit)
            if done is True:
                return
            if done is not False:
                raise ExtensionError(
                    f"{type(own).__name__}: handle returned {done!r}; return True for an exit "
                    "that is dealt with, else False",
                    own,
                )
        if ours is None:
            raise ExtensionError(
                f"{type(own).__name__}: pyvmm has no handler for {kind.__name__}: handle it", own
            )
        ours(vcpu, exit)

    return handle
