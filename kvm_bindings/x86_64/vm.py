"""A VM's fd on x86-64: the in-kernel PC devices, and port writes that wait."""

from __future__ import annotations

import kvm_bindings
from kvm_bindings.abi import ffi_for
from kvm_bindings.errors import check
from kvm_bindings.x86_64 import ioctls
from kvm_bindings.x86_64.vcpu import Vcpu

ffi = ffi_for("x86_64")


class Vm(kvm_bindings.Vm):
    """One VM. Close it after its vCPUs."""

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU: the id is the local APIC's."""
        return Vcpu(*self._create_vcpu(vcpu_id))

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages below 4 GiB that only Intel's KVM uses."""
        check("KVM_SET_TSS_ADDR", self._value(ioctls.KVM_SET_TSS_ADDR, gpa), "{:#x}", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page below 4 GiB that only Intel's KVM uses."""
        result = self._pointer(ioctls.KVM_SET_IDENTITY_MAP_ADDR, ffi.new("uint64_t *", gpa))
        check("KVM_SET_IDENTITY_MAP_ADDR", result, "{:#x}", gpa)

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PIC, IOAPIC and a local APIC per vCPU, in the kernel."""
        check("KVM_CREATE_IRQCHIP", self._value(ioctls.KVM_CREATE_IRQCHIP))

    def create_pit2(self) -> None:
        """KVM_CREATE_PIT2: the 8254 timer, in the kernel."""
        config = ffi.new("struct kvm_pit_config *")
        check("KVM_CREATE_PIT2", self._pointer(ioctls.KVM_CREATE_PIT2, config))

    def coalesce_port_writes(self, port: int, size: int) -> bool:
        """KVM_REGISTER_COALESCED_MMIO for ports, as `coalesce_mmio_writes`."""
        return self._coalesce(kvm_bindings.ioctls.KVM_CAP_COALESCED_PIO, port, size, is_port=True)
