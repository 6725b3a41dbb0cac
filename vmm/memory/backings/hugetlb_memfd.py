"""A memfd of huge pages."""

from __future__ import annotations

import errno
import os

from vmm.memory.backing import Traits
from vmm.memory.backings.mapped import MappedBacking

HUGE_PAGE = 2 << 20


class HugetlbMemfdBacking(MappedBacking):
    """A memfd of 2 MiB pages out of the host's reserve, taken when it is created.

    hugetlbfs has no write(2), so the host goes through the mapping. A hole smaller than a huge
    page leaves zeros and gives nothing back.
    """

    name = "memfd-hugetlb"
    is_guest_memfd = False
    traits = Traits(
        pread=True,
        pwrite=False,
        splice=False,
        mmap=True,
        private_access="allowed",
        granule=HUGE_PAGE,
        conversion="a hole, or zeros written over parts of huge pages",
    )

    _reserves = True

    def __init__(self, size: int, label: str = "pyvmm-guest") -> None:
        """`size` is rounded up to whole huge pages. Raises OSError.

        All of them are set aside now (ENOMEM: the host has too few), the hole below 4 GiB too: a
        guest that touches a page which isn't there could not go on.
        """
        size = -(-size // HUGE_PAGE) * HUGE_PAGE
        fd = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        try:
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            raise
        try:
            super().__init__(fd, size)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise OSError(
                    errno.ENOMEM,
                    f"this host has no {size // HUGE_PAGE} huge pages to spare; reserve them in "
                    "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
                ) from None
            raise

    def resident_bytes(self, offset: int = 0, size: int = 0) -> int:
        """Bytes of huge pages that the kernel holds (st_blocks)."""
        return os.fstat(self.fd).st_blocks * 512
