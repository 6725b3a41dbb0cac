"""Schemes: the mechanisms that make KVM honour page states."""

from __future__ import annotations

from typing import Protocol

from kvm_bindings import Vm
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.backing import Backing
from vmm.memory.guest_memory import GuestMemory


class Scheme(Protocol):
    """How one VM tells private from shared pages.

    `apply` makes KVM honour a conversion and `revert` takes an `apply` back; both raise KvmError.
    Discarding the losing side's pages is the transaction's work, after `apply`.
    """

    name: str
    converts_on_fault: bool
    """Whether KVM_EXIT_MEMORY_FAULT means that the guest wants the page in the other state."""

    def install(self, vm: Vm, memory: GuestMemory) -> None: ...
    def apply(self, area: Range, kind: Kind) -> None: ...
    def revert(self, area: Range, kind: Kind) -> None: ...


class MemslotTable:
    """Hands out slot numbers and installs backings as memslots."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._next = 0

    def add(self, gpa: int, area: Range, backing: Backing) -> None:
        """Map `area` of a backing (offset = GPA without C-bit) at guest-physical `gpa`."""
        hva = backing.hva + area.start
        if backing.is_guest_memfd:
            self._vm.set_user_memory_region2(
                self._next, gpa, area.size, hva, backing.fd, area.start
            )
        else:
            self._vm.set_user_memory_region(self._next, gpa, area.size, hva)
        self._next += 1


class PlainScheme:
    """An ordinary VM: all memory is shared, and nothing can be converted."""

    name = "none"
    converts_on_fault = False

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        slots = MemslotTable(vm)
        for area in memory.ram:
            slots.add(area.start, area, memory.shared)

    def apply(self, area: Range, kind: Kind) -> None:
        """Nothing to do: every page is shared for good."""

    def revert(self, area: Range, kind: Kind) -> None:
        """Nothing to do."""


class CbitScheme:
    """Two GPA aliases: the private backing at GPA | C-bit, the shared one at GPA.

    The guest picks the side with every access, as a SEV guest does, so that KVM needs no telling:
    a conversion is complete once the losing side's pages are discarded. Common memory
    (GuestMemory.common_end) is the shared backing at both aliases.
    """

    name = "cbit"
    converts_on_fault = False

    def __init__(self, c_bit: int) -> None:
        """`c_bit` is the number of the address bit; all of RAM must lie below it."""
        self.c_bit = c_bit

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        if memory.private is None:
            raise ValueError("the cbit scheme needs a private backing")
        slots = MemslotTable(vm)
        for area in memory.ram:
            slots.add(area.start, area, memory.shared)
            common, own = area.split(memory.common_end)
            if common.size:
                slots.add(common.start | 1 << self.c_bit, common, memory.shared)
            if own.size:
                slots.add(own.start | 1 << self.c_bit, own, memory.private)

    def apply(self, area: Range, kind: Kind) -> None:
        """Nothing to do: both aliases exist all the time."""

    def revert(self, area: Range, kind: Kind) -> None:
        """Nothing to do."""
