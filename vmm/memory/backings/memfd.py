"""A memfd: the backing that exists everywhere."""

from __future__ import annotations

import os

from kvm_bindings import fdops
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.backing import Traits
from vmm.memory.backings.fd_io import FdIoBacking


class MemfdBacking(FdIoBacking):
    """A memfd: pread, pwrite and splice work on it, and st_blocks says what is resident."""

    name = "memfd"
    _flags = os.MFD_CLOEXEC
    is_guest_memfd = False
    traits = Traits(pread=True, pwrite=True, splice=True, mmap=True, private_access="allowed")

    def __init__(self, size: int, label: str = "pyvmm-guest") -> None:
        """Creates the memfd, `size` bytes long and empty. Raises OSError."""
        fd = -1
        try:
            fd = os.memfd_create(label, self._flags)
            os.ftruncate(fd, size)
            self._prepare(fd)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            what = f"{size >> 20} MiB of guest memory: {error.strerror}"
            raise OSError(error.errno, what) from None
        super().__init__(fd, size)

    def _prepare(self, fd: int) -> None:
        """For variants: what is to be done to a fresh memfd. Raises OSError."""

    def resident_bytes(self, offset: int = 0, size: int = 0) -> int:
        """Bytes of memory that the kernel holds for the memfd (st_blocks), or a part of it."""
        if size:
            return fdops.cached_pages(self.fd, offset, size) * PAGE_SIZE
        return os.fstat(self.fd).st_blocks * 512
