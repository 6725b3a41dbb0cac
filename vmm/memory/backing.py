"""The objects behind guest memory, one protocol for all of them.

In every backing the offset is the guest-physical address (without the C-bit): files are sparse,
so the hole below 4 GiB costs nothing, and no table of offsets can go wrong.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Protocol

from kvm_bindings import fdops
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.transfer import FdCopier

Buffer = bytes | bytearray | memoryview

_IOV_MAX = 1024  # buffers that one preadv(2) or pwritev(2) takes


def byte_count(buffer: Buffer) -> int:
    """The buffer's size in bytes: len() counts a memoryview's items, which may be larger."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


class Backing(Protocol):
    """What stands behind one side (private or shared) of guest memory.

    `fd` belongs to the backing. `hva` is the address of a mapping that exists because KVM wants
    one for a memslot; nobody else uses it, except where `access` says so. Offsets and sizes are
    bytes. Reads and writes move everything or raise OSError.
    """

    name: str
    fd: int
    size: int
    hva: int
    is_guest_memfd: bool
    access: str
    """How the host reaches the bytes, for reports: "pread/pwrite", "/proc/self/mem", "none"."""
    host_access: str
    """What a host access to a private page meets: "kernel-refused" or "policy-refused"."""

    def pread(self, size: int, offset: int) -> bytes: ...
    def pwrite(self, data: Buffer, offset: int) -> None: ...
    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> None: ...
    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None: ...
    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int: ...
    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int: ...
    def punch(self, offset: int, size: int) -> None: ...
    def resident_bytes(self) -> int: ...
    def close(self) -> None: ...


class _FdBacking:
    """What all backings share: an fd, KVM's mapping of it, holes, and closing."""

    def __init__(self, fd: int, size: int) -> None:
        """Takes over `fd`, also when it raises KvmError."""
        self.fd = fd
        self.size = size
        try:
            self.hva = fdops.map_shared(fd, size)
        except OSError:
            os.close(fd)
            raise

    def punch(self, offset: int, size: int) -> None:
        """Give the pages back; they read as zeros afterwards. Raises KvmError."""
        fdops.punch_hole(self.fd, offset, size)

    def close(self) -> None:
        """Unmap and close; the VM's memslots must be gone or never run again."""
        if self.fd >= 0:
            fdops.unmap(self.hva, self.size)
            os.close(self.fd)
            self.fd = -1


def _fill(buffer: bytearray | memoryview, data: bytes) -> int:
    """Put `data` into a buffer of that size; the size."""
    memoryview(buffer).cast("B")[:] = data
    return len(data)


def _write_all(fd: int, data: Buffer, offset: int) -> None:
    written = os.pwrite(fd, data, offset)
    if written != byte_count(data):
        view = memoryview(data).cast("B")
        while written < len(view):
            written += os.pwrite(fd, view[written:], offset + written)


class MemfdBacking(_FdBacking):
    """A memfd: pread, pwrite and splice work on it, and st_blocks says what is resident."""

    name = "memfd"
    is_guest_memfd = False
    access = "pread/pwrite"
    host_access = "policy-refused"

    def __init__(self, size: int, label: str = "pyvmm-guest") -> None:
        """Creates the memfd, `size` bytes long and empty. Raises OSError."""
        fd = os.memfd_create(label, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            raise
        super().__init__(fd, size)
        self._copier = FdCopier()

    def pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        while len(data) != size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"memfd ends before {offset + size:#x}")
            data += more
        return data

    def pwrite(self, data: Buffer, offset: int) -> None:
        _write_all(self.fd, data, offset)

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        expected = sum(map(byte_count, buffers))
        whole = len(buffers) <= _IOV_MAX
        if whole and os.preadv(self.fd, list(buffers), offset) == expected:
            return
        for buffer in buffers:  # too many, or a short read: piece by piece
            offset += _fill(buffer, self.pread(byte_count(buffer), offset))

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        expected = sum(map(byte_count, buffers))
        whole = len(buffers) <= _IOV_MAX
        if whole and os.pwritev(self.fd, list(buffers), offset) == expected:
            return
        for buffer in buffers:
            _write_all(self.fd, buffer, offset)
            offset += byte_count(buffer)

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        return self._copier.copy(src_fd, src_offset, self.fd, offset, size)

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        return self._copier.copy(self.fd, offset, dst_fd, dst_offset, size)

    def resident_bytes(self) -> int:
        """Bytes of memory that the kernel holds for the memfd (st_blocks)."""
        return os.fstat(self.fd).st_blocks * 512


class GuestMemfdBacking(_FdBacking):
    """A guest_memfd with the MMAP flag; init-shared ones can be filled and read by the host.

    Its file operations have no read, write or splice (ESPIPE, up to Linux 7.3). For init-shared
    ones the nearest honest thing is a system call *into the mapping*: pread and pwrite on
    /proc/self/mem at the mapping's address, and pread(2) of another file with the mapping as its
    buffer. A page that the host can't reach is EIO or EFAULT there, never a SIGBUS.
    """

    is_guest_memfd = True

    def __init__(self, fd: int, size: int, *, init_shared: bool) -> None:
        """Takes over `fd` (from KVM_CREATE_GUEST_MEMFD with MMAP, and INIT_SHARED if said).

        Raises OSError, the fd closed.
        """
        super().__init__(fd, size)
        self.init_shared = init_shared
        self.name = "guest_memfd-mmap" if init_shared else "guest_memfd"
        self.access = "/proc/self/mem" if init_shared else "none"
        self.host_access = "policy-refused" if init_shared else "kernel-refused"
        self._mem = -1
        if init_shared:
            try:
                self._mem = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                self.close()
                raise

    def close(self) -> None:
        super().close()
        if self._mem >= 0:
            os.close(self._mem)
            self._mem = -1

    def _address(self, offset: int, size: int) -> int:
        if not self.init_shared:
            raise PrivateAccess(
                f"access to {size} bytes at {offset:#x} of a guest_memfd that the host can't "
                "reach; use --private-mem=guest_memfd-mmap or memfd where it must"
            )
        if offset < 0 or offset + size > self.size:
            raise OSError(errno.EINVAL, f"range {offset:#x}+{size:#x} is outside the guest_memfd")
        return self.hva + offset

    def pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self._mem, size, self._address(offset, size))
        if len(data) != size:
            raise OSError(errno.EIO, f"only {len(data)} of {size} bytes at {offset:#x} readable")
        return data

    def pwrite(self, data: Buffer, offset: int) -> None:
        _write_all(self._mem, data, self._address(offset, byte_count(data)))

    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        for buffer in buffers:
            offset += _fill(buffer, self.pread(byte_count(buffer), offset))

    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None:
        for buffer in buffers:
            self.pwrite(buffer, offset)
            offset += byte_count(buffer)

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        address = self._address(offset, size)
        done = 0
        while done < size:
            moved = fdops.pread_to_address(src_fd, address + done, size - done, src_offset + done)
            if moved == 0:
                break
            done += moved
        return done

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        address = self._address(offset, size)
        done = 0
        while done < size:
            done += fdops.pwrite_from_address(
                dst_fd, address + done, size - done, dst_offset + done
            )
        return done

    def resident_bytes(self) -> int:
        """Bytes of memory that the kernel holds: cachestat(2), as there are no st_blocks."""
        return fdops.cached_pages(self.fd) * PAGE_SIZE
