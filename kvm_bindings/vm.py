"""A virtual machine's fd: memslots, interrupts, event fds, vCPUs. One method per ioctl."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from kvm_bindings import ioctls
from kvm_bindings._kvm import ffi, lib
from kvm_bindings.errors import fail
from kvm_bindings.guest_memfd import GuestMemfd
from kvm_bindings.owned_fd import OwnedFd
from kvm_bindings.vcpu import Vcpu


class Vm(OwnedFd):
    """One VM. Close it after its vCPUs."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size

    def _value(self, request: int, value: int) -> int:
        """An ioctl whose argument is a number; EINTR is retried, as everywhere but KVM_RUN."""
        while True:
            result = int(lib.pyvmm_ioctl_value(self.fd, request, value))
            if result != -errno.EINTR:
                return result

    def _pointer(self, request: int, argument: Any) -> int:
        while True:
            result = int(lib.pyvmm_ioctl_pointer(self.fd, request, argument))
            if result != -errno.EINTR:
                return result

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION for this VM: 0 when absent."""
        result = self._value(ioctls.KVM_CHECK_EXTENSION, capability)
        if result < 0:
            fail("KVM_CHECK_EXTENSION", result, f"{capability}")
        return result

    def enable_cap(self, capability: int, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments."""
        cap = ffi.new("struct kvm_enable_cap *", {"cap": capability, "args": list(args)})
        result = self._pointer(ioctls.KVM_ENABLE_CAP, cap)
        if result < 0:
            fail("KVM_ENABLE_CAP", result, f"cap={capability}, args={[hex(a) for a in args]}")

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages below 4 GiB that only Intel's KVM uses."""
        result = self._value(ioctls.KVM_SET_TSS_ADDR, gpa)
        if result < 0:
            fail("KVM_SET_TSS_ADDR", result, f"{gpa:#x}")

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page below 4 GiB that only Intel's KVM uses."""
        result = self._pointer(ioctls.KVM_SET_IDENTITY_MAP_ADDR, ffi.new("uint64_t *", gpa))
        if result < 0:
            fail("KVM_SET_IDENTITY_MAP_ADDR", result, f"{gpa:#x}")

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PIC, IOAPIC and a local APIC per vCPU, in the kernel."""
        result = self._value(ioctls.KVM_CREATE_IRQCHIP, 0)
        if result < 0:
            fail("KVM_CREATE_IRQCHIP", result)

    def create_pit2(self) -> None:
        """KVM_CREATE_PIT2: the 8254 timer, in the kernel."""
        result = self._pointer(ioctls.KVM_CREATE_PIT2, ffi.new("struct kvm_pit_config *"))
        if result < 0:
            fail("KVM_CREATE_PIT2", result)

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: set the level of an interrupt line."""
        line = ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": level})
        result = self._pointer(ioctls.KVM_IRQ_LINE, line)
        if result < 0:
            fail("KVM_IRQ_LINE", result, f"gsi={gsi}, level={level}")

    def irqfd(self, eventfd: int, gsi: int, resamplefd: int | None = None) -> None:
        """KVM_IRQFD: a write to `eventfd` raises `gsi`.

        With `resamplefd` the line is level-triggered: it stays up until the guest's EOI, which
        KVM announces on that eventfd.
        """
        irqfd = ffi.new("struct kvm_irqfd *", {"fd": eventfd, "gsi": gsi})
        if resamplefd is not None:
            irqfd.flags = ioctls.KVM_IRQFD_FLAG_RESAMPLE
            irqfd.resamplefd = resamplefd
        result = self._pointer(ioctls.KVM_IRQFD, irqfd)
        if result < 0:
            fail("KVM_IRQFD", result, f"{eventfd=}, {gsi=}, {resamplefd=}")

    def set_gsi_routing(
        self,
        pins: Iterable[tuple[int, int, int]],
        messages: Iterable[tuple[int, int, int]] = (),
    ) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table of what a GSI leads to.

        `pins` are (gsi, irqchip, pin), of which a GSI may have several; `messages` are
        (gsi, address, data) of message-signalled interrupts.
        """
        entries: list[dict[str, object]] = [
            {
                "gsi": gsi,
                "type": ioctls.KVM_IRQ_ROUTING_IRQCHIP,
                "u": {"irqchip": {"irqchip": chip, "pin": pin}},
            }
            for gsi, chip, pin in pins
        ]
        entries += [
            {
                "gsi": gsi,
                "type": ioctls.KVM_IRQ_ROUTING_MSI,
                "u": {
                    "msi": {
                        "address_lo": address & 0xFFFF_FFFF,
                        "address_hi": address >> 32,
                        "data": data,
                    }
                },
            }
            for gsi, address, data in messages
        ]
        table = ffi.new("struct kvm_irq_routing *", {"nr": len(entries), "entries": entries})
        result = self._pointer(ioctls.KVM_SET_GSI_ROUTING, table)
        if result < 0:
            fail("KVM_SET_GSI_ROUTING", result, f"nr={len(entries)}")

    def ioeventfd(
        self,
        eventfd: int,
        port: int,
        size: int,
        datamatch: int | None = None,
        *,
        deassign: bool = False,
    ) -> None:
        """KVM_IOEVENTFD: a write of `size` bytes to `port` (of the value `datamatch`, if given)
        signals `eventfd` and doesn't exit to user space."""
        event = ffi.new(
            "struct kvm_ioeventfd *",
            {"addr": port, "len": size, "fd": eventfd, "flags": ioctls.KVM_IOEVENTFD_FLAG_PIO},
        )
        if datamatch is not None:
            event.flags |= ioctls.KVM_IOEVENTFD_FLAG_DATAMATCH
            event.datamatch = datamatch
        if deassign:
            event.flags |= ioctls.KVM_IOEVENTFD_FLAG_DEASSIGN
        result = self._pointer(ioctls.KVM_IOEVENTFD, event)
        if result < 0:
            fail("KVM_IOEVENTFD", result, f"{eventfd=}, {port=:#x}, {size=}, {datamatch=}")

    def coalesce_port_writes(self, port: int, size: int) -> bool:
        """KVM_REGISTER_COALESCED_MMIO for ports: writes to them wait in a ring instead of exiting,
        and are found there (Vcpu.coalesced_writes) at the next exit. False where KVM can't."""
        if not self.check_extension(ioctls.KVM_CAP_COALESCED_PIO):
            return False
        zone = ffi.new("struct kvm_coalesced_mmio_zone *", {"addr": port, "size": size, "pio": 1})
        result = self._pointer(ioctls.KVM_REGISTER_COALESCED_MMIO, zone)
        if result < 0:
            fail("KVM_REGISTER_COALESCED_MMIO", result, f"{port=:#x}, {size=}")
        return True

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: `size` bytes at `gpa` are the memory at `hva`; 0 deletes."""
        region = ffi.new(
            "struct kvm_userspace_memory_region *",
            {
                "slot": slot,
                "flags": flags,
                "guest_phys_addr": gpa,
                "memory_size": size,
                "userspace_addr": hva,
            },
        )
        result = self._pointer(ioctls.KVM_SET_USER_MEMORY_REGION, region)
        if result < 0:
            fail(
                "KVM_SET_USER_MEMORY_REGION",
                result,
                f"{slot=}, {gpa=:#x}, {size=:#x}, {hva=:#x}, {flags=:#x}",
            )

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        guest_memfd: int,
        guest_memfd_offset: int,
        flags: int = ioctls.KVM_MEM_GUEST_MEMFD,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2: a memslot with a guest_memfd (its fd) behind it.

        Raises KvmError: EINVAL (EEXIST since 7.x) when the guest_memfd's range has a slot already,
        EEXIST when the slot overlaps another one in guest-physical memory.
        """
        region = ffi.new(
            "struct kvm_userspace_memory_region2 *",
            {
                "slot": slot,
                "flags": flags,
                "guest_phys_addr": gpa,
                "memory_size": size,
                "userspace_addr": hva,
                "guest_memfd_offset": guest_memfd_offset,
                "guest_memfd": guest_memfd,
            },
        )
        result = self._pointer(ioctls.KVM_SET_USER_MEMORY_REGION2, region)
        if result < 0:
            fail(
                "KVM_SET_USER_MEMORY_REGION2",
                result,
                f"{slot=}, {gpa=:#x}, {size=:#x}, {hva=:#x}, {guest_memfd=}, "
                f"{guest_memfd_offset=:#x}, {flags=:#x}",
            )

    def set_memory_attributes(self, gpa: int, size: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: make a range private (8) or shared (0)."""
        argument = ffi.new(
            "struct kvm_memory_attributes *",
            {"address": gpa, "size": size, "attributes": attributes},
        )
        result = self._pointer(ioctls.KVM_SET_MEMORY_ATTRIBUTES, argument)
        if result < 0:
            hint = ""
            if result in (-errno.ENOTTY, -errno.EINVAL):
                supported = self.check_extension(ioctls.KVM_CAP_MEMORY_ATTRIBUTES)
                if not supported or attributes & ~supported:
                    hint = (
                        "this VM type has no such memory attributes "
                        f"(KVM_CAP_MEMORY_ATTRIBUTES = {supported:#x}), use --scheme cbit"
                    )
            fail(
                "KVM_SET_MEMORY_ATTRIBUTES",
                result,
                f"{gpa=:#x}, {size=:#x}, {attributes=:#x}",
                hint,
            )

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD. Raises KvmError (EINVAL: flags this VM doesn't take)."""
        argument = ffi.new("struct kvm_create_guest_memfd *", {"size": size, "flags": flags})
        result = self._pointer(ioctls.KVM_CREATE_GUEST_MEMFD, argument)
        if result < 0:
            fail("KVM_CREATE_GUEST_MEMFD", result, f"{size=:#x}, {flags=:#x}")
        # Unlike a VM's or vCPU's fd this one comes without close-on-exec (Linux 6.18): no
        # program that pyvmm starts may inherit the guest's memory.
        os.set_inheritable(result, False)
        return GuestMemfd(result, size, flags)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU: the id is the local APIC's on x86."""
        ring_page = self.check_extension(ioctls.KVM_CAP_COALESCED_MMIO)
        result = self._value(ioctls.KVM_CREATE_VCPU, vcpu_id)
        if result < 0:
            fail("KVM_CREATE_VCPU", result, f"{vcpu_id}")
        return Vcpu(result, vcpu_id, self._vcpu_mmap_size, ring_page)
