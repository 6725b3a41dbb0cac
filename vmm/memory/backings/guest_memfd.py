"""guest_memfd, in each combination of its creation flags that is good for something.

Its file operations have no read, write or splice (ESPIPE, up to Linux 7.3), except where a kernel
was changed so: then the host's access goes that way, and nothing of it through a mapping.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvm_bindings import fdops
from vmm.core.errors import PrivateAccess
from vmm.core.lean_typing import NoReturn, Protocol
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.backing import Buffer, FdBacking, Traits, byte_count
from vmm.memory.backings.fd_io import FdIoBacking
from vmm.memory.backings.mapped import MappedBacking


def _traits(private_access: str, *, mmap: bool = True, in_place: bool = False) -> Traits:
    return Traits(False, False, False, mmap, private_access, in_place=in_place)


class _GuestMemfd(FdBacking):
    is_guest_memfd = True

    def resident_bytes(self, offset: int = 0, size: int = 0) -> int:
        """Bytes of memory that the kernel holds: cachestat(2), as there are no st_blocks."""
        return fdops.cached_pages(self.fd, offset, size) * PAGE_SIZE


class GuestMemfdBacking(_GuestMemfd):
    """Flags MMAP: the guest's faults are served from it on any VM, and the host is kept out.

    It can be mapped, as KVM wants an address for the memslot, but a load from there is SIGBUS.
    """

    name = "guest_memfd"
    access = "none"
    traits = _traits("SIGBUS")

    def _refuse(self, size: int, offset: int) -> NoReturn:
        raise PrivateAccess(
            f"access to {size} bytes at {offset:#x} of a guest_memfd that the host can't "
            "reach; use --private-mem=guest_memfd-mmap or memfd where it must"
        )

    def pread(self, size: int, offset: int) -> bytes:
        self._refuse(size, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._refuse(byte_count(data), offset)

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        self._refuse(sum(map(byte_count, buffers)), offset)

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        self._refuse(sum(map(byte_count, buffers)), offset)

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        self._refuse(size, offset)

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        self._refuse(size, offset)


class PlainGuestMemfdBacking(GuestMemfdBacking):
    """No flags: nobody can map it at all. Serves the guest only where KVM's memory attributes say
    that a page is private; what else the guest sees lies behind the memslot's address."""

    name = "guest_memfd-plain"
    traits = _traits("no mapping", mmap=False)


class MappedGuestMemfdBacking(_GuestMemfd, MappedBacking):
    """Flags MMAP and INIT_SHARED: served from on any VM, filled and read by the host."""

    name = "guest_memfd-mmap"
    traits = _traits("allowed")


class FdIoGuestMemfdBacking(_GuestMemfd, FdIoBacking):
    """The same where the kernel has read, write and splice for it."""

    name = "guest_memfd-mmap"
    traits = MappedGuestMemfdBacking.traits._replace(pread=True, pwrite=True, splice=True)


class AttributedFd(Protocol):
    """The part of kvm_bindings.GuestMemfd that in-place conversion needs."""

    fd: int

    def set_memory_attributes2(self, offset: int, size: int, attributes: int) -> None: ...


class InPlaceBacking(_GuestMemfd):
    """Flags MMAP and INIT_SHARED on a VM that has private memory: both sides in one file.

    Whether the host reaches a page follows its attribute in the file itself
    (KVM_SET_MEMORY_ATTRIBUTES2, posted for a later kernel).
    """

    name = "guest_memfd-in-place"
    traits = _traits("SIGBUS", in_place=True)._replace(
        conversion="a hole for each run of pages that changes"
    )

    def __init__(self, guest_memfd: AttributedFd, size: int) -> None:
        """Takes over the guest_memfd's fd, also when it raises OSError."""
        self.guest_memfd = guest_memfd
        super().__init__(guest_memfd.fd, size)


class InPlaceGuestMemfdBacking(InPlaceBacking, MappedBacking):
    """With the host's access through a mapping, which meets private pages with EFAULT or EIO."""


class InPlaceFdIoBacking(InPlaceBacking, FdIoBacking):
    """With read, write and splice on the fd, which meet private pages with EACCES."""

    traits = InPlaceBacking.traits._replace(pread=True, pwrite=True, splice=True)
