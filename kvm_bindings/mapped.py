"""Guest memory by system calls that copy, with KVM's mapping as their buffer.

The only way in and out of a protected guest's memory (pKVM) that is safe whatever a page's state:
a page that the guest keeps to itself is EFAULT, and stays as it is. Reads and writes of the
memory's own fd, pinning (O_DIRECT, splice) and loads are not: they destroy the page, or get past
the protection. Measured on Linux 7.3. For a memfd of ours it is the quickest way between memory
and a disk's file (`move_in`, `move_out`). An address here is a number that goes to the kernel.
"""

from __future__ import annotations

import errno
import os
import struct

from kvm_bindings import datapath
from kvm_bindings._kvm import ffi, lib
from kvm_bindings.errors import check


def read_mapped(pieces: list[int], size: int) -> tuple[bytearray, int]:
    """The bytes of all pieces (address, size, address, size...), whose sum is `size`, and how
    many are true: fewer than `size` where the next one is out of reach.

    One process_vm_writev(2) of this process to itself. Raises KvmError for all but EFAULT.
    """
    data = bytearray(size)
    return data, _copy("process_vm_writev", pieces, ffi.from_buffer(data), writing=False)


def write_mapped(pieces: list[int], data: bytes | bytearray | memoryview) -> int:
    """Write `data`, as long as the pieces together, over them: how many bytes were written,
    fewer where the next one is out of reach.

    One process_vm_readv(2) of this process from itself. Raises KvmError for all but EFAULT.
    """
    buffer = ffi.from_buffer("char[]", data, require_writable=False)
    return _copy("process_vm_readv", pieces, buffer, writing=True)


def _copy(name: str, pieces: list[int], buffer: object, *, writing: bool) -> int:
    table = struct.pack(f"{len(pieces)}Q", *pieces)
    moved = int(lib.pyvmm_copy_mapped(table, len(pieces) // 2, buffer, writing))
    return check(name, moved, "{} pieces", len(pieces) // 2)


def move_in(fd: int, memory: int, room: int, moves: list[int], most: int = datapath.NEVER) -> int:
    """pread(2) of a file straight into guest memory, of which `room` bytes are mapped at the
    address `memory`: `moves` are file offset, guest offset, size, file offset... The number of
    bytes, short at the file's end, and when it has taken longer than `most` nanoseconds.

    Raises KvmError: EINVAL, before a byte moves, for what is outside the mapping; EFAULT where a
    page is out of reach, with what lies before it moved. On a protected guest's memory only for
    files of which `is_copied` is true.
    """
    return _move("pread", fd, memory, room, moves, most, writing=False)


def move_out(fd: int, memory: int, room: int, moves: list[int], most: int = datapath.NEVER) -> int:
    """pwrite(2) to a file straight from guest memory; `moves` are guest offset, file offset, size,
    guest offset... All else as for `move_in`."""
    return _move("pwrite", fd, memory, room, moves, most, writing=True)


def _move(
    name: str, fd: int, memory: int, room: int, moves: list[int], most: int, *, writing: bool
) -> int:
    count = len(moves)
    table = struct.pack(f"{count}Q", *moves)
    moved = -errno.EINTR
    while moved == -errno.EINTR:  # handlers of signals run in between, as PEP 475 has it
        moved = lib.pyvmm_move_mapped(fd, memory, room, table, count // 3, writing, most)
    if moved < 0:
        check(name, moved, "fd={}, {} moves", fd, count // 3)
    return moved


def probe_mapped(addresses: list[int]) -> list[bool]:
    """Whether the kernel can read the byte at each address, found out by reading it.

    The page is there afterwards if it was not before. Raises KvmError for all but EFAULT.
    """
    reached = bytearray(len(addresses))
    table = struct.pack(f"{len(addresses)}Q", *addresses)
    result = lib.pyvmm_probe_mapped(table, len(addresses), ffi.from_buffer(reached))
    check("process_vm_writev", int(result), "{} addresses", len(addresses))
    return [bool(each) for each in reached]


def is_copied(fd: int) -> bool:
    """Whether a file may be read and written with a protected guest's memory as the buffer: no
    O_DIRECT, and on a file system that is known to copy. Raises KvmError."""
    return bool(check("fstatfs", lib.pyvmm_is_copied(fd), "fd={}", fd))


def out_of_reach(error: OSError) -> bool:
    """Whether the error is the kernel's word for a page that it can't reach."""
    return error.errno == errno.EFAULT


def name_only(fd: int) -> None:
    """Make `fd` one that only names its file (O_PATH): fstat(2) works, and every read, write,
    splice, mapping or hole is EBADF from now on. Raises OSError.

    Mappings and memslots made before keep their file.
    """
    path = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        os.dup2(path, fd, inheritable=False)
    finally:
        os.close(path)
