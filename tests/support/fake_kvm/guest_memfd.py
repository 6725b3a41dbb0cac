"""A guest_memfd: a memfd for its pages, and the rules of virt/kvm/guest_memfd.c about it."""

from __future__ import annotations

import errno
import os
from bisect import bisect_left, insort

from kvm_bindings import GuestMemfd, KvmError, PagesInUse, fdops
from tests.support.fake_kvm.attributes import Attributes
from tests.support.fake_kvm.kernel import EINVAL, INIT_SHARED, MMAP, PRIVATE, FakeKernel
from vmm.core.ranges import PAGE_SIZE, Range, page_align_down


class FakeGuestMemfd(GuestMemfd):
    """As kvm_bindings' own. Its fd is a memfd's: what the kernel refuses to the host on a
    guest_memfd (pread, a mapping's bytes) is answered by the `host_` methods only."""

    def __init__(self, kernel: FakeKernel, size: int, flags: int, supported: int) -> None:
        fd = os.memfd_create("fake-guest_memfd", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        super().__init__(fd, size, flags)
        self._kernel = kernel
        self._supported = supported
        self._inode = os.fstat(fd).st_ino
        # The pages outlive the fd, as they do while the VM's slots refer to the inode.
        self.pages = os.dup(fd)
        self._bindings: dict[int, Range] = {}
        self._bound: list[tuple[int, int]] = []
        self._pinned: list[Range] = []
        self.attributes = Attributes(Range(0, size), 0 if flags & INIT_SHARED else PRIVATE)
        """In-place conversion: who owns which page."""

    @property
    def mappable(self) -> bool:
        return bool(self.flags & MMAP)

    @property
    def alive(self) -> bool:
        """Whether the file is still open. Whoever took the fd over may have closed it."""
        try:
            return self.fd >= 0 and os.fstat(self.fd).st_ino == self._inode
        except OSError:
            return False

    # -- memslots -----------------------------------------------------------------------------

    def bind(self, slot: int, offset: int, size: int) -> int:
        """Give a range to a memslot; 0, or an errno where it is outside or taken."""
        area = Range(offset, size)
        if area.end > self.size:
            return EINVAL
        # Bound ranges are disjoint: only the last that starts before the end can reach into it.
        index = bisect_left(self._bound, (area.end, -1)) - 1
        if index >= 0 and area.overlaps(self._bindings[self._bound[index][1]]):
            return self._kernel.binding_taken
        self._bindings[slot] = area
        insort(self._bound, (offset, slot))
        return 0

    def unbind(self, slot: int) -> None:
        area = self._bindings.pop(slot, None)
        if area is not None:
            del self._bound[bisect_left(self._bound, (area.start, slot))]

    def populate(self, offset: int) -> None:
        """A fault: the page comes into being, even for a load."""
        os.posix_fallocate(self.pages, page_align_down(offset), PAGE_SIZE)

    # -- in-place conversion ------------------------------------------------------------------

    def pin(self, offset: int, size: int) -> None:
        """Somebody (a device, an I/O under way) holds references to these pages."""
        self._pinned.append(Range(offset, size))

    def unpin(self) -> None:
        self._pinned.clear()

    def is_private(self, offset: int) -> bool:
        """Of a file that is closed nobody can be asked: its pages count as shared."""
        return self.alive and bool(self.attributes.get(offset) & PRIVATE)

    def is_shared(self, offset: int) -> bool:
        """Whether the host may touch the page, on VM types with private memory and without."""
        if self._kernel.in_place:
            return not self.attributes.get(offset) & PRIVATE
        return bool(self.flags & INIT_SHARED)

    def set_memory_attributes2(self, offset: int, size: int, attributes: int) -> None:
        words = f"{offset=:#x}, {size=:#x}, {attributes=:#x}"
        self._kernel.enter("KVM_SET_MEMORY_ATTRIBUTES2", words)
        if not self._kernel.in_place:
            raise KvmError("KVM_SET_MEMORY_ATTRIBUTES2", errno.ENOTTY, words)
        unaligned = offset % PAGE_SIZE or size % PAGE_SIZE or not size
        known = self._supported & PRIVATE and not attributes & ~self._supported
        if not known or unaligned or offset + size > self.size:
            raise KvmError("KVM_SET_MEMORY_ATTRIBUTES2", EINVAL, words)
        area = Range(offset, size)
        if attributes & PRIVATE:
            held = [pin.start for pin in self._pinned if pin.overlaps(area)]
            if held:
                first = max(min(held), offset)
                raise PagesInUse("KVM_SET_MEMORY_ATTRIBUTES2", errno.EAGAIN, words, first)
        changing = [r for r, was in self.attributes.runs(area) if was != attributes]
        for run in [] if self._kernel.keeps_content else changing:
            self._scramble(run)
        self.attributes.set(area, attributes)

    def _scramble(self, area: Range) -> None:
        """What a page holds after a conversion is the VM type's business: here, nothing that was
        there before."""
        fdops.punch_hole(self.pages, area.start, area.size)

    def has_file_io(self) -> bool:
        return self._kernel.file_io

    # -- what the kernel answers to the host --------------------------------------------------

    def host_pread(self, size: int, offset: int) -> bytes:
        """pread(2) on the fd, within one page: released kernels have no read at all."""
        if not self._kernel.file_io:
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
        if offset >= self.size:
            return b""
        if not self.is_shared(offset):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return os.pread(self.pages, size, offset)

    def host_pwrite(self, data: bytes, offset: int) -> None:
        """pwrite(2) on the fd, within one page, of a VM that has vCPUs."""
        if not self._kernel.file_io:
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
        if offset >= self.size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not self.is_shared(offset):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        os.pwrite(self.pages, data, offset)

    def host_map(self) -> None:
        """mmap(2) with MAP_SHARED. Raises OSError."""
        if not self.mappable:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    def host_load(self, size: int, offset: int) -> bytes:
        """A system call's read through a mapping: EFAULT stands for SIGBUS."""
        self._require_accessible(offset)
        return os.pread(self.pages, size, offset)

    def host_store(self, data: bytes, offset: int) -> None:
        self._require_accessible(offset)
        os.pwrite(self.pages, data, offset)

    def _require_accessible(self, offset: int) -> None:
        if offset >= self.size or not self.is_shared(offset):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        self.populate(offset)

    def host_fallocate(self, mode: int, offset: int, size: int) -> None:
        """fallocate(2) with `mode`. Raises OSError."""
        keep, punch = fdops.FALLOC_FL_KEEP_SIZE, fdops.FALLOC_FL_PUNCH_HOLE
        if offset < 0 or size <= 0:  # the file system's own check, before guest_memfd's
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if mode not in (keep, keep | punch):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if offset % PAGE_SIZE or size % PAGE_SIZE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if mode & punch:
            within = Range(0, self.size).intersection(Range(offset, size))
            if within is not None:
                fdops.punch_hole(self.pages, within.start, within.size)
        elif offset + size > self.size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        else:
            os.posix_fallocate(self.pages, offset, size)

    def host_resident_pages(self) -> int:
        return os.fstat(self.pages).st_blocks * 512 // PAGE_SIZE

    def release(self) -> None:
        """The VM is gone, and with it the last reference."""
        os.close(self.pages)
        self.close()
