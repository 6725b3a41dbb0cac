"""Two addresses for each page, and the bit marks the shared one: what an Arm CCA Realm sees."""

from __future__ import annotations

from kvm_bindings import Vm
from vmm.conversion.scheme import private_side, set_slot
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory


class RealmScheme:
    """The private backing at GPA, the shared one at GPA | bit: `cbit` the other way round.

    The guest picks the side with every access, so that KVM needs no telling: a conversion is
    complete once the losing side's pages are discarded. The bit is the top one of the guest's
    addresses (Realm Management Monitor specification, "IPA space").
    """

    name = "realm"
    alias = 0
    converts_on_fault = False
    told = True
    side_by_side = True

    def __init__(self, shared_bit: int) -> None:
        """`shared_bit` is the number of the address bit; all of RAM must lie below it."""
        self.shared_alias = 1 << shared_bit

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        private = private_side(memory, self.name)
        for number, area in enumerate(memory.ram):
            set_slot(vm, 2 * number, area.start, area, private)
            set_slot(vm, 2 * number + 1, area.start | self.shared_alias, area, memory.shared)

    def apply(self, area: Range, kind: Kind) -> None:
        """Nothing to do: both aliases exist all the time."""

    def revert(self, area: Range, kind: Kind) -> None:
        """Nothing to do."""
