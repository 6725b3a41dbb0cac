"""A VM's fd on x86-64: the in-kernel PC devices, and port writes that wait."""

from __future__ import annotations

import errno

import kvm_bindings
from kvm_bindings.abi import ffi_for
from kvm_bindings.errors import check, fail
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

    # -- state --------------------------------------------------------------------------------

    def get_irqchip(self, chip: int) -> bytes:
        """KVM_GET_IRQCHIP: struct kvm_irqchip of the first 8259 (0), the second (1), or the
        IOAPIC (2), whose number it begins with."""
        state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        check("KVM_GET_IRQCHIP", self._pointer(ioctls.KVM_GET_IRQCHIP, state), "chip={}", chip)
        return bytes(ffi.buffer(state))

    def set_irqchip(self, data: bytes) -> None:
        """KVM_SET_IRQCHIP, as `get_irqchip` gives it. Raises KvmError (EINVAL: no such chip)."""
        _require_size("KVM_SET_IRQCHIP", "kvm_irqchip", data)
        state = ffi.from_buffer("struct kvm_irqchip *", data)
        result = self._pointer(ioctls.KVM_SET_IRQCHIP, state)
        check("KVM_SET_IRQCHIP", result, "chip={}", state.chip_id)

    def get_pit2(self) -> bytes:
        """KVM_GET_PIT2: struct kvm_pit_state2."""
        state = ffi.new("struct kvm_pit_state2 *")
        check("KVM_GET_PIT2", self._pointer(ioctls.KVM_GET_PIT2, state))
        return bytes(ffi.buffer(state))

    def set_pit2(self, data: bytes) -> None:
        """KVM_SET_PIT2, as `get_pit2` gives it: each channel counts from its beginning again."""
        _require_size("KVM_SET_PIT2", "kvm_pit_state2", data)
        state = ffi.from_buffer("struct kvm_pit_state2 *", data)
        check("KVM_SET_PIT2", self._pointer(ioctls.KVM_SET_PIT2, state))

    def get_clock(self) -> int:
        """KVM_GET_CLOCK: what the guests' kvmclock shows now, in nanoseconds."""
        state = ffi.new("struct kvm_clock_data *")
        check("KVM_GET_CLOCK", self._pointer(ioctls.KVM_GET_CLOCK, state))
        return int(state.clock)

    def set_clock(self, nanoseconds: int) -> None:
        """KVM_SET_CLOCK: the guests' kvmclock goes on from there."""
        state = ffi.new("struct kvm_clock_data *", {"clock": nanoseconds})
        result = self._pointer(ioctls.KVM_SET_CLOCK, state)
        check("KVM_SET_CLOCK", result, "clock={}", nanoseconds)


def _require_size(name: str, kind: str, data: bytes) -> None:
    """The kernel reads a whole structure."""
    if len(data) != ffi.sizeof(f"struct {kind}"):
        fail(name, -errno.EINVAL, f"{len(data)} bytes")
