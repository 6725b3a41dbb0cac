"""What stands behind guest memory: one protocol for all backings, and what each says of itself.

In every backing the offset is the guest-physical address (without the C-bit): files are sparse,
so the hole below 4 GiB costs nothing, and no table of offsets can go wrong. The backings
themselves are in `vmm.memory.backings`, one file each.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

from kvm_bindings import fdops
from vmm.core.lean_typing import NamedTuple, Protocol
from vmm.core.ranges import PAGE_SIZE

Buffer = bytes | bytearray | memoryview


def byte_count(buffer: Buffer) -> int:
    """The buffer's size in bytes: len() counts a memoryview's items, which may be larger."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


def fill(buffer: bytearray | memoryview, data: bytes) -> int:
    """Put `data` into a buffer of that size; the size."""
    memoryview(buffer).cast("B")[:] = data
    return len(data)


def write_all(fd: int, data: Buffer, offset: int) -> None:
    """pwrite(2) until everything is written. Raises OSError: EIO where a call writes nothing."""
    written = os.pwrite(fd, data, offset)
    if written != byte_count(data):
        view = memoryview(data).cast("B")
        while written < len(view):
            moved = os.pwrite(fd, view[written:], offset + written)
            if not moved:
                raise OSError(errno.EIO, f"nothing more is written at {offset + written:#x}")
            written += moved


class Traits(NamedTuple):
    """What the host's kernel allows with a backing: claims that the conformance suite tries out.

    `pread`, `pwrite` and `splice` are system calls on the fd itself, `mmap` a mapping of it.
    """

    pread: bool
    pwrite: bool
    splice: bool
    mmap: bool
    private_access: str
    """What a load from a private page by the host meets, were it tried: "allowed", "SIGBUS",
    "SIGSEGV" or "no mapping"; by a system call a signal is EFAULT or EIO. Where it is allowed,
    pyvmm's own refusal is all there is."""
    granule: int = PAGE_SIZE
    """Bytes: the smallest part that a hole gives back; parts of one become zeros and stay."""
    in_place: bool = False
    """Whether a page keeps its place in one file when it changes sides; else there are two."""
    conversion: str = "a hole in the side that is given up"
    """What a conversion costs beyond the scheme's own work."""


class Backing(Protocol):
    """What stands behind one side (private or shared) of guest memory, or behind both.

    `fd` belongs to the backing. `hva` is the address of a mapping that exists because KVM wants
    one for a memslot (0: there is none); nobody else uses it, except where `access` says so.
    Offsets and sizes are bytes. Reads and writes move everything or raise OSError.
    """

    name: str
    fd: int
    size: int
    hva: int
    is_guest_memfd: bool
    traits: Traits
    access: str
    """How the host reaches the bytes, for reports: "pread/pwrite", "/proc/self/mem", "none"."""

    @property
    def host_access(self) -> str:
        """What a host access to a private page meets: "kernel-refused" or "policy-refused"."""

    def pread(self, size: int, offset: int) -> bytes: ...
    def pwrite(self, data: Buffer, offset: int) -> None: ...
    def preadv(self, buffers: Sequence[bytearray | memoryview], offset: int) -> None: ...
    def pwritev(self, buffers: Sequence[Buffer], offset: int) -> None: ...
    def read_many(self, pieces: list[int]) -> bytes | bytearray: ...
    def write_many(self, pieces: list[int], data: bytes) -> None: ...
    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int: ...
    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int: ...
    def punch(self, offset: int, size: int) -> None: ...
    def allocate(self, offset: int, size: int) -> None: ...
    def resident_bytes(self, offset: int = 0, size: int = 0) -> int: ...
    def forget_mapping(self, offset: int, size: int) -> None: ...
    def close(self) -> None: ...


class FdBacking(ABC):
    """What all backings share: an fd, KVM's mapping of it, holes, and closing."""

    traits: Traits
    _reserves = False

    def __init__(self, fd: int, size: int) -> None:
        """Takes over `fd`, also when it raises KvmError. Maps it where it can be mapped."""
        self.fd = fd
        self.size = size
        self.hva = 0
        if self.traits.mmap:
            try:
                self.hva = fdops.map_shared(fd, size, reserve=self._reserves)
            except OSError:
                os.close(fd)
                raise

    @property
    def host_access(self) -> str:
        allowed = self.traits.private_access == "allowed"
        return "policy-refused" if allowed else "kernel-refused"

    @abstractmethod
    def pread(self, size: int, offset: int) -> bytes:
        """All of these bytes. Raises OSError."""

    @abstractmethod
    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data`. Raises OSError."""

    def read_many(self, pieces: list[int]) -> bytes | bytearray:
        """The bytes of all pieces (offset, size, offset, size...), one after the other."""
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        return b"".join([self.pread(size, offset) for offset, size in pairs])

    def write_many(self, pieces: list[int], data: bytes) -> None:
        """Write `data` over the pieces (offset, size, offset, size...) in their order."""
        done = 0
        for offset, size in zip(pieces[::2], pieces[1::2], strict=True):
            self.pwrite(data[done : done + size], offset)
            done += size

    def allocate(self, offset: int, size: int) -> None:
        """Have the kernel hold memory for these pages, whose content stays. Raises KvmError."""
        fdops.fallocate(self.fd, fdops.FALLOC_FL_KEEP_SIZE, offset, size)

    def punch(self, offset: int, size: int) -> None:
        """Give the pages back; they read as zeros afterwards. Raises KvmError."""
        fdops.punch_hole(self.fd, offset, size)

    def forget_mapping(self, offset: int, size: int) -> None:
        """Have KVM map these pages anew when the guest next touches them, whose content stays. On
        arm64 it invalidates the instruction cache then. Raises KvmError."""
        if self.hva:
            start = offset & -PAGE_SIZE
            fdops.forget(self.hva + start, offset + size - start)

    def close(self) -> None:
        """Unmap and close; the VM's memslots must be gone or never run again."""
        if self.fd >= 0:
            if self.hva:
                fdops.unmap(self.hva, self.size)
            os.close(self.fd)
            self.fd = -1
