"""Two addresses for each page: the guest picks the side with every access."""

from __future__ import annotations

from kvm_bindings import Vm, ioctls
from vmm.conversion.scheme import private_side, set_slot
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory


class CbitScheme:
    """Two GPA aliases: the private backing at GPA | C-bit, the shared one at GPA.

    The guest picks the side with every access, as a SEV guest does, so that KVM needs no telling:
    a conversion is complete once the losing side's pages are discarded.
    """

    name = "cbit"
    vm_type = ioctls.KVM_X86_DEFAULT_VM
    converts_on_fault = False

    def __init__(self, c_bit: int) -> None:
        """`c_bit` is the number of the address bit; all of RAM must lie below it."""
        self.alias = 1 << c_bit

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        private = private_side(memory, self.name)
        for number, area in enumerate(memory.ram):
            set_slot(vm, 2 * number, area.start, area, memory.shared)
            set_slot(vm, 2 * number + 1, area.start | self.alias, area, private)

    def apply(self, area: Range, kind: Kind) -> None:
        """Nothing to do: both aliases exist all the time."""

    def revert(self, area: Range, kind: Kind) -> None:
        """Nothing to do."""
