"""Two addresses for each page: the guest picks the side with every access."""

from __future__ import annotations

from kvm_bindings import Vm
from vmm.conversion.scheme import private_side, set_slot
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.backing import Backing
from vmm.memory.guest_memory import GuestMemory


class CbitScheme:
    """Two GPA aliases: the private backing at GPA | C-bit, the shared one at GPA.

    The guest picks the side with every access, as a SEV guest does, so that KVM needs no telling:
    a conversion is complete once the losing side's pages are discarded. Common memory
    (GuestMemory.common) is the shared backing at both aliases.
    """

    name = "cbit"
    shared_alias = 0
    converts_on_fault = False
    told = True
    side_by_side = True

    def __init__(self, c_bit: int) -> None:
        """`c_bit` is the number of the address bit; all of RAM must lie below it."""
        self.alias = 1 << c_bit

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        private = private_side(memory, self.name)
        slots: list[tuple[int, Range, Backing]] = []
        for area in memory.ram:
            slots.append((area.start, area, memory.shared))
            common = area.intersection(memory.common)
            if common is not None:
                slots.append((common.start | self.alias, common, memory.shared))
            for own in area.without(memory.common):
                slots.append((own.start | self.alias, own, private))
        for number, (gpa, area, backing) in enumerate(slots):
            set_slot(vm, number, gpa, area, backing)

    def apply(self, area: Range, kind: Kind) -> None:
        """Nothing to do: both aliases exist all the time."""

    def revert(self, area: Range, kind: Kind) -> None:
        """Nothing to do."""
