"""A modelled VM: memslots, attributes, guest_memfds, and where a guest's access ends up."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Self, cast

from kvm_bindings import KvmError, ioctls
from kvm_bindings.exits import Exit, MemoryFaultExit, MmioExit
from kvm_bindings.x86_64 import Vm
from kvm_bindings.x86_64 import ioctls as x86
from tests.support.fake_kvm.attributes import Attributes
from tests.support.fake_kvm.guest_memfd import FakeGuestMemfd
from tests.support.fake_kvm.kernel import (
    EBADF,
    EFAULT,
    EINVAL,
    ENOTTY,
    PRIVATE,
    FakeKernel,
    VmType,
    refuse,
)
from tests.support.fake_kvm.slots import GUEST_MEMFD, READONLY, U64, Refusal, Slot, SlotTable
from tests.support.fake_kvm.vcpu import FakeVcpu
from vmm.core.ranges import PAGE_SIZE, Range, page_align_down

GPA_SPACE = 1 << 52
_FAULT_PRIVATE = 1 << 3  # KVM_MEMORY_EXIT_FLAG_PRIVATE


@dataclass(frozen=True, slots=True)
class _Place:
    """A guest-physical address as a file position: in a guest_memfd, or in this process."""

    fd: int
    offset: int
    slot: Slot


class FakeVm:
    """kvm_bindings.Vm's methods, and `guest_read` and `guest_write`."""

    def __init__(self, kernel: FakeKernel, vm_type: VmType) -> None:
        self.kernel = kernel
        self.vm_type = vm_type
        self.fd = 0
        self.hypercall_exits = 0
        self.slots = SlotTable(kernel.memslots)
        self.attributes = Attributes(Range(0, GPA_SPACE), 0)
        self._guest_memfds: list[FakeGuestMemfd] = []
        self._mmio: dict[int, int] = {}
        self._generation = 0
        self.vcpus: list[FakeVcpu] = []
        self._memory = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)

    # -- capabilities -------------------------------------------------------------------------

    @staticmethod
    def capability(kernel: FakeKernel, vm_type: VmType, number: int) -> int:
        """KVM_CHECK_EXTENSION for a VM of that type."""
        per_vm = kernel.attributes_ioctl and not kernel.in_place
        return {
            ioctls.KVM_CAP_NR_MEMSLOTS: kernel.memslots,
            x86.KVM_CAP_EXIT_HYPERCALL: 1 << 12,
            ioctls.KVM_CAP_VM_TYPES: sum(1 << n for n in kernel.vm_types),
            ioctls.KVM_CAP_MEMORY_ATTRIBUTES: vm_type.attributes if per_vm else 0,
            ioctls.KVM_CAP_GUEST_MEMFD_FLAGS: vm_type.guest_memfd_flags,
            ioctls.KVM_CAP_PRE_FAULT_MEMORY: int(kernel.pre_fault),
        }.get(number, 1)

    def check_extension(self, capability: int) -> int:
        return self.capability(self.kernel, self.vm_type, capability)

    def enable_cap(self, capability: int, *args: int) -> None:
        self.kernel.enter("KVM_ENABLE_CAP", f"cap={capability}")
        if capability == x86.KVM_CAP_EXIT_HYPERCALL:
            if args[0] & ~(1 << 12):
                raise refuse("KVM_ENABLE_CAP", EINVAL)
            self.hypercall_exits = args[0]

    # -- memslots -----------------------------------------------------------------------------

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, hva: int, flags: int = 0
    ) -> None:
        self._set_region("KVM_SET_USER_MEMORY_REGION", slot, gpa, size, hva, flags)

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        guest_memfd: int,
        guest_memfd_offset: int,
        flags: int = GUEST_MEMFD,
    ) -> None:
        found = self._find(guest_memfd) if flags & GUEST_MEMFD else None
        self._set_region(
            "KVM_SET_USER_MEMORY_REGION2", slot, gpa, size, hva, flags, found, guest_memfd_offset
        )

    def _set_region(
        self,
        name: str,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int,
        guest_memfd: FakeGuestMemfd | int | None = None,
        offset: int = 0,
    ) -> None:
        words = f"{slot=}, {gpa=:#x}, {size=:#x}, {flags=:#x}"
        self.kernel.enter(name, words)
        if name == "KVM_SET_USER_MEMORY_REGION" and flags & GUEST_MEMFD:
            raise refuse(name, EINVAL, words)
        try:
            if self.slots.set(slot, gpa, size, hva, flags, guest_memfd, offset):
                self._generation += 1
        except Refusal as refusal:
            raise refuse(name, refusal.number, words) from None

    def _find(self, fd: int) -> FakeGuestMemfd | int:
        """This VM's guest_memfd with that fd, or the errno of a wrong one."""
        for guest_memfd in self._guest_memfds:
            if guest_memfd.alive and guest_memfd.fd == fd:
                return guest_memfd
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            return EBADF
        return EINVAL  # another file, or another VM's

    # -- attributes and guest_memfd -----------------------------------------------------------

    def set_memory_attributes(self, gpa: int, size: int, attributes: int) -> None:
        words = f"{gpa=:#x}, {size=:#x}, {attributes=:#x}"
        self.kernel.enter("KVM_SET_MEMORY_ATTRIBUTES", words)
        if not self.kernel.attributes_ioctl or self.kernel.in_place:
            raise refuse("KVM_SET_MEMORY_ATTRIBUTES", ENOTTY, words)
        unaligned = gpa % PAGE_SIZE or size % PAGE_SIZE
        if attributes & ~self.vm_type.attributes or not size or unaligned or gpa + size >= U64:
            raise refuse("KVM_SET_MEMORY_ATTRIBUTES", EINVAL, words)
        within = self.attributes.span.intersection(Range(gpa, size))
        if within is not None:
            self.attributes.set(within, attributes)

    def create_guest_memfd(self, size: int, flags: int = 0) -> FakeGuestMemfd:
        words = f"{size=:#x}, {flags=:#x}"
        self.kernel.enter("KVM_CREATE_GUEST_MEMFD", words)
        supported = self.vm_type.guest_memfd_flags
        if flags & ~supported or not 0 < size < 1 << 63 or size % PAGE_SIZE:
            raise refuse("KVM_CREATE_GUEST_MEMFD", EINVAL, words)
        created = FakeGuestMemfd(self.kernel, size, flags, self.vm_type.attributes)
        self._guest_memfds.append(created)
        return created

    def guest_memfd(self, fd: int) -> FakeGuestMemfd:
        """The open guest_memfd with that fd."""
        found = self._find(fd)
        assert isinstance(found, FakeGuestMemfd)
        return found

    # -- what a guest sees --------------------------------------------------------------------

    def guest_read(self, gpa: int, size: int = 8) -> bytes | Exit:
        """A load by the guest, within one page: its bytes, or the exit that it causes.

        Raises KvmError where KVM_RUN fails without an exit (a shared page without memory)."""
        place = self._resolve(gpa)
        if place is None:
            return MmioExit(gpa, size, False, b"")
        if not isinstance(place, _Place):
            return place
        try:
            data = os.pread(place.fd, size, place.offset)
        except OSError as error:
            raise KvmError("KVM_RUN", EFAULT, f"gpa={gpa:#x}") from error
        assert len(data) == size
        return data

    def guest_write(self, gpa: int, data: bytes) -> Exit | None:
        """A store by the guest, within one page; None when it went to memory."""
        place = self._resolve(gpa)
        if place is None or (isinstance(place, _Place) and place.slot.flags & READONLY):
            return MmioExit(gpa, len(data), True, data)
        if not isinstance(place, _Place):
            return place
        try:
            os.pwrite(place.fd, data, place.offset)
        except OSError as error:
            raise KvmError("KVM_RUN", EFAULT, f"gpa={gpa:#x}") from error
        return None

    def is_private(self, gpa: int, slot: Slot | None) -> bool:
        """What the guest's access to the page means: x86 asks the attributes."""
        if self.kernel.in_place:
            gmem = None if slot is None else slot.guest_memfd
            if slot is None or gmem is None or not self.vm_type.attributes:
                return False
            return gmem.is_private(slot.offset + gpa - slot.area.start)
        return bool(self.attributes.get(gpa) & PRIVATE)

    def _resolve(self, gpa: int) -> _Place | MemoryFaultExit | None:
        """Where the page's bytes are; None where there is no memory.

        An access without memory leaves an MMIO entry in KVM's page table: good for MMIO,
        attributes or not, until a memslot changes. An access through an entry that has gone
        stale counts as shared, whatever the attribute says ("emulated MMIO is shared-only",
        kvm_mmu_page_fault; seen on Linux 7.3).
        """
        page, slot = page_align_down(gpa), self.slots.at(gpa)
        private = self.is_private(gpa, slot)
        cached = self._mmio.get(page)
        if cached == self._generation:
            return None
        if cached is not None and private:
            return self._fault(gpa, private=False)
        if slot is None:
            if private:
                return self._fault(gpa, private)
            self._mmio[page] = self._generation
            return None
        if not private and not slot.gmem_only:
            self._mmio.pop(page, None)
            return _Place(self._memory, slot.hva + gpa - slot.area.start, slot)
        gmem = slot.guest_memfd
        if gmem is None or not gmem.alive:
            return self._fault(gpa, private)
        self._mmio.pop(page, None)
        offset = slot.offset + gpa - slot.area.start
        gmem.populate(offset)
        return _Place(gmem.pages, offset, slot)

    def _fault(self, gpa: int, private: bool) -> MemoryFaultExit:
        flags = _FAULT_PRIVATE if private else 0
        return MemoryFaultExit(flags, page_align_down(gpa), PAGE_SIZE, errno.EFAULT)

    # -- the VM's fd as a file of guest memory ------------------------------------------------

    def host_pread(self, size: int, gpa: int) -> bytes:
        """pread(2) on the VM's fd, within one page. Raises OSError."""
        place = self._host_place(gpa, write=False)
        try:
            return os.pread(place.fd, size, place.offset)
        except OSError:
            raise OSError(EFAULT, os.strerror(EFAULT)) from None

    def host_pwrite(self, data: bytes, gpa: int) -> None:
        """pwrite(2) likewise."""
        place = self._host_place(gpa, write=True)
        try:
            os.pwrite(place.fd, data, place.offset)
        except OSError:
            raise OSError(EFAULT, os.strerror(EFAULT)) from None

    def _host_place(self, gpa: int, *, write: bool) -> _Place:
        slot = self.slots.at(gpa)
        refused = 0
        if not self.kernel.vm_io:
            refused = errno.ESPIPE
        elif slot is None:
            refused = EFAULT
        elif (write and slot.flags & READONLY) or self.is_private(gpa, slot):
            refused = errno.EACCES
        elif slot.gmem_only and (slot.guest_memfd is None or not slot.guest_memfd.alive):
            refused = EFAULT
        if slot is None or refused:
            raise OSError(refused, os.strerror(refused))
        if not slot.gmem_only:
            return _Place(self._memory, slot.hva + gpa - slot.area.start, slot)
        offset = slot.offset + gpa - slot.area.start
        gmem = slot.guest_memfd
        assert gmem is not None
        if not gmem.is_shared(offset):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return _Place(gmem.pages, offset, slot)

    # -- the rest -----------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> FakeVcpu:
        self.kernel.enter("KVM_CREATE_VCPU", f"{vcpu_id}")
        vcpu = FakeVcpu(self, vcpu_id)
        self.vcpus.append(vcpu)
        return vcpu

    def ignore(self, *arguments: object, **named: object) -> None:
        """Accepted: not about memory."""

    set_tss_addr = set_identity_map_addr = create_irqchip = create_pit2 = ignore
    irqfd = ioeventfd = ignore

    def coalesce_port_writes(self, port: int, size: int) -> bool:
        return False

    def close(self) -> None:
        """Any number of times. The pages of its guest_memfds go with it."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
            for guest_memfd in self._guest_memfds:
                # An fd that somebody took over is theirs to close.
                os.close(guest_memfd.pages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def as_vm(self) -> Vm:
        """For code that is typed for the real one."""
        return cast(Vm, self)
