"""Writes down what a case does to KVM, call by call, as steps of a C program (emit_c).

A case is run once more, on a platform that listens: to the VM, its guest_memfds, the backings and
the guest. What can't be said in C makes the case one that isn't emitted: several VMs or vCPUs,
another call of KVM's, memory of some other kind.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from kvm_bindings import GuestMemfd, System, Vm
from kvm_bindings.exits import MemoryFaultExit, MmioExit
from vmm.arch.guest_cpu import CODE_SIZE, WORD, Gate, GuestCpu, GuestStopped
from vmm.conversion.scheme import Scheme
from vmm.conversion.schemes.remap import Parking
from vmm.core.errors import one_line
from vmm.core.ranges import Range
from vmm.memory.backing import Backing
from vmm.selftest.case import Case, Cell
from vmm.selftest.emit_c import Step, c_program
from vmm.selftest.entries import Combination
from vmm.selftest.platform import Platform

_OF_VM = ("set_user_memory_region", "set_user_memory_region2", "set_memory_attributes")
_ASKS = ("check_extension", "create_vcpu", "fileno", "close")  # changes nothing that C must repeat
_MOST_STEPS = 4000
_GMEM = 100  # memories from here on are guest_memfds (kvm_replay.h)


class Inexpressible(Exception):
    """The case does what the C program has no words for; the text says what."""


class _Memory(NamedTuple):
    number: int
    inode: int


class Recorder:
    """A Platform that hands everything on to another one, and keeps the steps."""

    def __init__(self, platform: Platform) -> None:
        self.is_modelled = platform.is_modelled
        self.steps: list[Step] = []
        self.obstacle = ""
        self._platform = platform
        self._memories: list[_Memory] = []
        self._gmems = 0
        self._closed: set[int] = set()
        self._vms = 0
        self._vm_type = 0
        self._alias = 0
        self.system: System = _Listened(platform.system, create_vm=self._create_vm)  # type: ignore[assignment]

    # -- Platform

    def vm_type(self, scheme: str) -> int:
        return self._platform.vm_type(scheme)

    def scheme(self, name: str, parked: Parking) -> Scheme:
        made = self._platform.scheme(name, parked)
        self._alias = made.alias | made.shared_alias
        return made

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> Sequence[GuestCpu]:
        if count > 1:
            self._cannot(f"{count} vCPUs")
        made = self._platform.guests(opened, vm, count, ram, alias, gate)
        for cpu in made:
            for verb in ("read", "write", "fill", "holds"):
                self._listen(cpu, verb, getattr(self, f"_guest_{verb}"))
        return made

    # -- listening

    def _cannot(self, what: str) -> None:
        self.obstacle = self.obstacle or what

    def _listen(self, thing: object, name: str, words: Callable[..., str | None]) -> None:
        """Calls go on as ever; `words` makes a step's call of their arguments (None: no step)."""
        original = getattr(thing, name)

        def listened(*arguments: Any, **more: Any) -> Any:
            call = words(*arguments, **more)
            try:
                result = original(*arguments, **more)
            except (OSError, GuestStopped) as error:
                self._note(call, _of_error(error))
                raise
            self._note(call, _of_result(name, result))
            return result

        setattr(thing, name, listened)

    def _note(self, call: str | None, seen: str) -> None:
        if call is None:
            return
        if len(self.steps) >= _MOST_STEPS:
            self._cannot(f"more than {_MOST_STEPS} steps")
            return
        self.steps.append(Step(call, seen))

    def _create_vm(self, vm_type: int = 0) -> Vm:
        vm = self._platform.system.create_vm(vm_type)
        self._vms += 1
        if self._vms > 1:
            self._cannot("several VMs")
        self._vm_type = vm_type
        for name in _OF_VM:
            self._listen(vm, name, getattr(self, f"_{name}"))
        self._listen_to_creation(vm)
        for name in _other_calls(type(vm)):
            self._listen(vm, name, lambda *_, name=name, **__: self._cannot(f"Vm.{name}"))
        return vm

    def _listen_to_creation(self, vm: Vm) -> None:
        create = vm.create_guest_memfd

        def created(size: int, flags: int = 0) -> GuestMemfd:
            call = f"create_guest_memfd({size:#x}, {flags:#x})"
            try:
                made = create(size, flags)
            except OSError as error:
                self._note(call, _of_error(error))
                raise
            self._note(call, "ok")
            number = self._gmems
            self._gmems += 1
            self._memories.append(_Memory(_GMEM + number, os.fstat(made.fd).st_ino))
            self._listen(
                made,
                "set_memory_attributes2",
                lambda offset, size, attributes: (
                    f"convert({number}, {offset:#x}, {size:#x}, {attributes:#x})"
                ),
            )
            self._listen(made, "close", lambda: self._closes(number))
            return made

        setattr(vm, "create_guest_memfd", created)  # noqa: B010

    def watch(self, backing: Backing) -> Backing:
        """Listens to the host's side of a backing."""
        memory = self._memory_of(backing.fd, backing.size)
        self._listen(
            backing, "punch", lambda offset, size: f"hole({memory}, {offset:#x}, {size:#x})"
        )
        self._listen(
            backing,
            "pread",
            lambda size, offset: f"host_load({memory}, {offset:#x}, {size:#x})",
        )
        self._listen(backing, "pwrite", lambda data, offset: self._stores(memory, data, offset))
        if memory >= _GMEM:
            self._listen(backing, "close", lambda: self._closes(memory - _GMEM))
        return backing

    def _closes(self, gmem: int) -> str | None:
        """A guest_memfd's end, by itself or with its backing: once."""
        if gmem in self._closed:
            return None
        self._closed.add(gmem)
        return f"gmem_close({gmem})"

    def _memory_of(self, fd: int, size: int) -> int:
        inode = os.fstat(fd).st_ino
        for memory in self._memories:
            if memory.inode == inode:
                return memory.number
        number = sum(memory.number < _GMEM for memory in self._memories)
        self._memories.append(_Memory(number, inode))
        self._note(f"new_memfd({size:#x})", "ok")
        return number

    # -- calls in C; addresses count from the area's start

    def _set_user_memory_region(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = 0
    ) -> str | None:
        return self._slot(slot, gpa, size, hva, flags, -1, 0)

    def _set_user_memory_region2(
        self, slot: int, gpa: int, size: int, hva: int, fd: int, offset: int, flags: int = 4
    ) -> str | None:
        inode = _inode(fd)
        for memory in self._memories:
            if memory.inode == inode and memory.number >= _GMEM:
                return self._slot(slot, gpa, size, hva, flags, memory.number - _GMEM, offset)
        self._cannot(f"a memslot with fd {fd}, which is no guest_memfd")
        return None

    def _slot(
        self, slot: int, gpa: int, size: int, hva: int, flags: int, gmem: int, offset: int
    ) -> str | None:
        if gpa + size <= CODE_SIZE and size:
            return None  # the guest's code, which the C program has its own of
        memory, at = self._at(hva)
        area = gpa - CODE_SIZE
        numbers = f"{slot}, {area & (1 << 64) - 1:#x}, {size:#x}, {memory}, {at:#x}, {flags:#x}"
        return f"memslot({numbers}, {gmem}, {offset:#x})"

    def _at(self, hva: int) -> tuple[int, int]:
        """Which memory an address is in, and where."""
        if not hva:
            return -1, 0
        inode, offset = _mapped(hva)
        for memory in self._memories:
            if memory.inode == inode:
                return memory.number, offset
        self._cannot("a memslot on other memory than memfds")
        return -1, 0

    def _set_memory_attributes(self, gpa: int, size: int, attributes: int) -> str:
        return f"set_attributes({gpa - CODE_SIZE:#x}, {size:#x}, {attributes:#x})"

    def _guest_read(self, address: int) -> str:
        return f"guest_load({address - CODE_SIZE:#x})"

    def _guest_write(self, address: int, word: int) -> str:
        return f"guest_store({address - CODE_SIZE:#x}, {word:#x})"

    def _guest_fill(self, address: int, size: int, word: int) -> str:
        return f"guest_fill({address - CODE_SIZE:#x}, {size:#x}, {word:#x})"

    def _guest_holds(self, address: int, size: int, word: int) -> str:
        return f"guest_holds({address - CODE_SIZE:#x}, {size:#x}, {word:#x})"

    def _stores(self, memory: int, data: Any, offset: int) -> str | None:
        content = bytes(data)
        word = content[:WORD]
        if len(content) % WORD or content != word * (len(content) // WORD):
            self._cannot("a host's write of other data than one word again and again")
            return None
        value = int.from_bytes(word, "little")
        return f"host_store({memory}, {offset:#x}, {len(content):#x}, {value:#x})"

    # -- the program

    def program(self, head: str) -> str:
        """The text of the C program. Raises Inexpressible."""
        if self.obstacle:
            raise Inexpressible(self.obstacle)
        if not self.steps:
            raise Inexpressible("no call of KVM's")
        return c_program(head, (self._vm_type, CODE_SIZE, 1), self.steps, self._alias)


class _Listened:
    """Another object, with some of its methods replaced."""

    def __init__(self, thing: object, **replaced: Callable[..., Any]) -> None:
        self._thing = thing
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)


def as_c(platform: Platform, combination: Combination, case: Case) -> str:
    """A case that fails in a cell, run once more, as a C program. Raises Inexpressible."""
    recorder = Recorder(platform)
    cell = Cell(recorder, combination, watch=recorder.watch)
    try:
        case.run(cell)
        reason = "nothing, this time"
    except Exception as failure:  # the case's, the host's or pyvmm's: it is what is shown
        reason = f"{type(failure).__name__}: {failure}"
    steps = list(recorder.steps)  # what closing does is no part of it
    cell.close()
    recorder.steps = steps
    head = (
        f"{case.name} in {combination}: {case.title}.\n\n"
        f"What failed: {one_line(reason)}.\n\n"
        "Each step has what was seen of it when that was so: the program ends with 0 where the\n"
        "case fails in the same way, and with 1 where something else is seen."
    )
    return recorder.program(head)


def _other_calls(kind: type) -> set[str]:
    """The ioctls of a class of kvm_bindings' that have no words in C."""
    known = {*_OF_VM, *_ASKS, "create_guest_memfd"}
    bound = (each for each in kind.__mro__ if each.__module__.partition(".")[0] == "kvm_bindings")
    return {
        name
        for each in bound
        for name, thing in vars(each).items()
        if not name.startswith("_") and callable(thing) and name not in known
    }


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return 0


def _mapped(address: int) -> tuple[int, int]:
    """The inode behind an address of ours, and the offset there; 0 where there is none."""
    with open("/proc/self/maps") as file:
        for line in file:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ (\d+)", line)
            if found and int(found[1], 16) <= address < int(found[2], 16):
                return int(found[4]), address - int(found[1], 16) + int(found[3], 16)
    return 0, 0


def _of_error(error: Exception) -> str:
    """As kvm_replay.h says it."""
    if isinstance(error, GuestStopped):
        if isinstance(error.exit, MemoryFaultExit):
            gpa = (error.exit.gpa - CODE_SIZE) & (1 << 64) - 1
            return f"memory fault, flags={error.exit.flags}, gpa=+{gpa:#x}"
        return "mmio" if isinstance(error.exit, MmioExit) else f"{error.exit}"
    number = error.errno if isinstance(error, OSError) else 0
    return errno.errorcode.get(number or 0, str(number)).replace("ENOTSUP", "EOPNOTSUPP")


def _of_result(name: str, result: object) -> str:
    if name == "read":
        return f"{result:#x}"
    if name == "holds":
        return "yes" if result else "no"
    if name == "pread":
        assert isinstance(result, bytes | bytearray)
        word = bytes(result[:WORD])
        uniform = bytes(result) == word * (len(result) // WORD)
        return f"{int.from_bytes(word, 'little'):#x}" if uniform else "mixed"
    return "ok"
