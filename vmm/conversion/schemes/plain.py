"""No scheme: an ordinary VM."""

from __future__ import annotations

from kvm_bindings import Vm
from vmm.conversion.scheme import set_slot
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory


class PlainScheme:
    """All memory is shared, and nothing can be converted."""

    name = "none"
    alias = 0
    shared_alias = 0
    converts_on_fault = False
    told = True

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        for number, area in enumerate(memory.ram):
            set_slot(vm, number, area.start, area, memory.shared)

    def apply(self, area: Range, kind: Kind) -> None:
        """Nothing to do: every page is shared for good."""

    def revert(self, area: Range, kind: Kind) -> None:
        """Nothing to do."""
