"""KVM's own memory attributes: one address, and KVM keeps the state of every page."""

from __future__ import annotations

from kvm_bindings import Vm, ioctls
from vmm.conversion.scheme import private_side, set_slot
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory, PageState

PRIVATE, SHARED = ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE, 0


class AttributesScheme:
    """Both sides behind one memslot for each range of RAM: the guest_memfd serves pages whose
    attribute says private, the shared backing all others.

    A conversion is one KVM_SET_MEMORY_ATTRIBUTES, whatever its size. It moves no content: the
    side that is given up would come back as it was, were it not discarded.
    """

    name = "attributes"
    alias = 0
    shared_alias = 0
    converts_on_fault = True
    told = True

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        private = private_side(memory, self.name)
        for number, area in enumerate(memory.ram):
            set_slot(vm, number, area.start, area, memory.shared, private)
        self._set = vm.set_memory_attributes
        for run, state in memory.states():  # KVM starts with every page shared
            if state is PageState.PRIVATE:
                self._set(run.start, run.size, PRIVATE)

    def apply(self, area: Range, kind: Kind) -> None:
        self._set(area.start, area.size, SHARED if kind is Kind.SHARE else PRIVATE)

    def revert(self, area: Range, kind: Kind) -> None:
        self._set(area.start, area.size, PRIVATE if kind is Kind.SHARE else SHARED)
