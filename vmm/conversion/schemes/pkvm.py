"""A protected guest under upstream pKVM: the hypervisor keeps the states, and tells nobody."""

from __future__ import annotations

from kvm_bindings import Vm
from vmm.conversion.scheme import set_slot
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory

MEM_SHARE, MEM_UNSHARE = 0xC600_0003, 0xC600_0004
"""ARM_SMCCC_VENDOR_HYP_KVM_MEM_SHARE_FUNC_ID and ..._UNSHARE_...: one page, by its address
(Documentation/virt/kvm/arm/hypercalls.rst). The hypervisor answers them at EL2."""


class PkvmScheme:
    """One memslot for each range of RAM, private and shared pages in one file.

    Every page is donated to the guest at its first touch, and private until the guest shares it.
    The host's part in a conversion is nothing: it could neither refuse one nor carry one out.
    """

    name = "pkvm"
    alias = 0
    shared_alias = 0
    converts_on_fault = False
    told = False
    side_by_side = True

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        for number, area in enumerate(memory.ram):
            set_slot(vm, number, area.start, area, memory.shared)

    def apply(self, area: Range, kind: Kind) -> None:
        """Raises ValueError: the host has no say, so the caller is wrong."""
        raise ValueError(f"{kind.value} {area}: only a protected guest can do that")

    def revert(self, area: Range, kind: Kind) -> None:
        """There is nothing that could have been applied."""
