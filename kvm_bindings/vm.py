"""A virtual machine's fd: memslots, interrupts, event fds, vCPUs. One method per ioctl."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from kvm_bindings import ioctls
from kvm_bindings._kvm import ffi
from kvm_bindings.errors import check, fail
from kvm_bindings.guest_memfd import GuestMemfd
from kvm_bindings.owned_fd import OwnedFd
from kvm_bindings.record import Record
from kvm_bindings.vcpu import Vcpu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvm_bindings.device import Device


class MessageRoute(Record):
    """A message-signalled interrupt that a GSI sends.

    `device_id` is who sends it, for an interrupt controller that asks (arm64's ITS does): there
    the requester id of a PCI function.
    """

    __slots__ = ("address", "data", "device_id", "gsi")

    def __init__(self, gsi: int, address: int, data: int, device_id: int | None = None) -> None:
        self.gsi = gsi
        self.address = address
        self.data = data
        self.device_id = device_id


class Vm(OwnedFd):
    """One VM. Close it after its vCPUs."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION for this VM: 0 when absent."""
        result = self._value(ioctls.KVM_CHECK_EXTENSION, capability)
        return check("KVM_CHECK_EXTENSION", result, "{}", capability)

    def enable_cap(self, capability: int, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments."""
        cap = ffi.new("struct kvm_enable_cap *", {"cap": capability, "args": list(args)})
        result = self._pointer(ioctls.KVM_ENABLE_CAP, cap)
        check("KVM_ENABLE_CAP", result, "cap={}, args={}", capability, [hex(a) for a in args])

    def irqfd(
        self,
        eventfd: int,
        gsi: int,
        resamplefd: int | None = None,
        *,
        deassign: bool = False,
    ) -> None:
        """KVM_IRQFD: a write to `eventfd` raises `gsi`; with `deassign` it no longer does.

        With `resamplefd` the line is level-triggered: it stays up until the guest's EOI, which
        KVM announces on that eventfd.
        """
        irqfd = ffi.new("struct kvm_irqfd *", {"fd": eventfd, "gsi": gsi})
        if deassign:
            irqfd.flags = ioctls.KVM_IRQFD_FLAG_DEASSIGN
        if resamplefd is not None:
            irqfd.flags = ioctls.KVM_IRQFD_FLAG_RESAMPLE
            irqfd.resamplefd = resamplefd
        result = self._pointer(ioctls.KVM_IRQFD, irqfd)
        check("KVM_IRQFD", result, "eventfd={}, gsi={}, resamplefd={}", eventfd, gsi, resamplefd)

    def set_gsi_routing(
        self,
        pins: Iterable[tuple[int, int, int]],
        messages: Iterable[MessageRoute] = (),
    ) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table of what a GSI leads to.

        `pins` are (gsi, irqchip, pin), of which a GSI may have several. Raises KvmError (EINVAL:
        a device id where KVM_CAP_MSI_DEVID is 0).
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
                "gsi": message.gsi,
                "type": ioctls.KVM_IRQ_ROUTING_MSI,
                "flags": 0 if message.device_id is None else ioctls.KVM_MSI_VALID_DEVID,
                "u": {
                    "msi": {
                        "address_lo": message.address & 0xFFFF_FFFF,
                        "address_hi": message.address >> 32,
                        "data": message.data,
                        "devid": message.device_id or 0,
                    }
                },
            }
            for message in messages
        ]
        table = ffi.new("struct kvm_irq_routing *", {"nr": len(entries), "entries": entries})
        result = self._pointer(ioctls.KVM_SET_GSI_ROUTING, table)
        check("KVM_SET_GSI_ROUTING", result, "nr={}", len(entries))

    def ioeventfd(
        self,
        eventfd: int,
        address: int,
        size: int,
        datamatch: int | None = None,
        *,
        port: bool,
        deassign: bool = False,
    ) -> None:
        """KVM_IOEVENTFD: a write of `size` bytes to a GPA, or to a `port` on architectures that
        have them (of the value `datamatch`, if given) signals `eventfd` and doesn't exit."""
        event = ffi.new("struct kvm_ioeventfd *", {"addr": address, "len": size, "fd": eventfd})
        if port:
            event.flags |= ioctls.KVM_IOEVENTFD_FLAG_PIO
        if datamatch is not None:
            event.flags |= ioctls.KVM_IOEVENTFD_FLAG_DATAMATCH
            event.datamatch = datamatch
        if deassign:
            event.flags |= ioctls.KVM_IOEVENTFD_FLAG_DEASSIGN
        check(
            "KVM_IOEVENTFD",
            self._pointer(ioctls.KVM_IOEVENTFD, event),
            "eventfd={}, {}={:#x}, size={}, datamatch={}",
            *(eventfd, "port" if port else "gpa", address, size, datamatch),
        )

    def coalesce_mmio_writes(self, gpa: int, size: int) -> bool:
        """KVM_REGISTER_COALESCED_MMIO: writes there wait in a ring instead of exiting, and are
        found in it (Vcpu.coalesced_writes) at the next exit. False where KVM can't."""
        return self._coalesce(ioctls.KVM_CAP_COALESCED_MMIO, gpa, size, is_port=False)

    def _coalesce(self, capability: int, address: int, size: int, *, is_port: bool) -> bool:
        if not self.check_extension(capability):
            return False
        zone = ffi.new(
            "struct kvm_coalesced_mmio_zone *", {"addr": address, "size": size, "pio": is_port}
        )
        check(
            "KVM_REGISTER_COALESCED_MMIO",
            self._pointer(ioctls.KVM_REGISTER_COALESCED_MMIO, zone),
            "{}={:#x}, size={}",
            *("port" if is_port else "gpa", address, size),
        )
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
        check(
            "KVM_SET_USER_MEMORY_REGION",
            self._pointer(ioctls.KVM_SET_USER_MEMORY_REGION, region),
            "slot={}, gpa={:#x}, size={:#x}, hva={:#x}, flags={:#x}",
            *(slot, gpa, size, hva, flags),
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
        check(
            "KVM_SET_USER_MEMORY_REGION2",
            self._pointer(ioctls.KVM_SET_USER_MEMORY_REGION2, region),
            "slot={}, gpa={:#x}, size={:#x}, hva={:#x}, guest_memfd={}, "
            "guest_memfd_offset={:#x}, flags={:#x}",
            *(slot, gpa, size, hva, guest_memfd, guest_memfd_offset, flags),
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
        check("KVM_CREATE_GUEST_MEMFD", result, "size={:#x}, flags={:#x}", size, flags)
        # Unlike a VM's or vCPU's fd this one comes without close-on-exec (Linux 6.18): no
        # program that pyvmm starts may inherit the guest's memory.
        os.set_inheritable(result, False)
        return GuestMemfd(result, size, flags)

    def create_device(self, device_type: int) -> Device:
        """KVM_CREATE_DEVICE. Raises KvmError (ENODEV: not in this kernel or on this machine)."""
        from kvm_bindings.device import Device  # x86 has no need of it

        argument = ffi.new("struct kvm_create_device *", {"type": device_type})
        check(
            "KVM_CREATE_DEVICE",
            self._pointer(ioctls.KVM_CREATE_DEVICE, argument),
            "type={}",
            device_type,
        )
        return Device(argument.fd, device_type)

    def can_create_device(self, device_type: int) -> bool:
        """KVM_CREATE_DEVICE with KVM_CREATE_DEVICE_TEST: asks, and creates nothing."""
        argument = ffi.new(
            "struct kvm_create_device *",
            {"type": device_type, "flags": ioctls.KVM_CREATE_DEVICE_TEST},
        )
        return self._pointer(ioctls.KVM_CREATE_DEVICE, argument) == 0

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU."""
        return Vcpu(*self._create_vcpu(vcpu_id))

    def _create_vcpu(self, vcpu_id: int) -> tuple[int, int, int, int]:
        """What a Vcpu is made of, for each architecture's own."""
        ring_page = self.check_extension(ioctls.KVM_CAP_COALESCED_MMIO)
        fd = check("KVM_CREATE_VCPU", self._value(ioctls.KVM_CREATE_VCPU, vcpu_id), "{}", vcpu_id)
        return fd, vcpu_id, self._vcpu_mmap_size, ring_page
