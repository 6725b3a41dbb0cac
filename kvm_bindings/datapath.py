"""Many system calls for one call from Python: the data path's inner loops, in C.

A batch of 32 small disk requests is some hundred system calls of half a microsecond each; made
from Python one by one they cost several times that. Guest memory is an fd and an offset here, as
everywhere; the only addresses are those of buffers that the caller owns, but for `copy_memory`.
"""

from __future__ import annotations

import errno
import os
import struct

from kvm_bindings._kvm import ffi, lib
from kvm_bindings.errors import check

NEVER = (1 << 64) - 1
"""A `splice_from` that no move reaches, a `most` that no time does."""


class Buffer:
    """Bytes of ours that both Python and C use."""

    __slots__ = ("bytes", "pointer")

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)
        self.pointer = ffi.from_buffer(self.bytes)


def pread_many(fd: int, pieces: list[int], size: int) -> bytearray:
    """The bytes of all pieces, one pread(2) each; `pieces` are offset, size, offset, size...

    `size` is their sum. Raises KvmError; EIO where the file ends in one of them.
    """
    data = bytearray(size)
    count = len(pieces)
    table = struct.pack(f"{count}Q", *pieces)
    result = lib.pyvmm_pread_many(fd, table, count // 2, ffi.from_buffer(data))
    if result < 0:
        check("pread", result, "fd={}, {} pieces", fd, count // 2)
    return data


def pwrite_many(fd: int, pieces: list[int], data: bytes) -> None:
    """Write `data` over all pieces in their order, one pwrite(2) each. Raises KvmError."""
    count = len(pieces)
    table = struct.pack(f"{count}Q", *pieces)
    result = lib.pyvmm_pwrite_many(fd, table, count // 2, data)
    if result < 0:
        check("pwrite", result, "fd={}, {} pieces", fd, count // 2)


def move_many(
    source: int,
    target: int,
    moves: list[int],
    buffer: Buffer,
    pipe: tuple[int, int],
    splice_from: int,
    most: int = NEVER,
) -> int:
    """Copy between two fds: `moves` are source offset, target offset, size, source offset...

    Moves of `splice_from` bytes or more go through `pipe` (read end, write end) inside the
    kernel, the others through `buffer`. The number of bytes, short at the source's end, and when
    it has taken longer than `most` nanoseconds. Raises OSError: the pipe may hold bytes then.
    """
    count, room = len(moves), len(buffer.bytes)
    table = struct.pack(f"{count}Q", *moves)
    read_end, write_end = pipe
    moved = -errno.EINTR
    while moved == -errno.EINTR:  # handlers of signals run in between, as PEP 475 has it
        moved = lib.pyvmm_move_many(
            source, target, table, count // 3, buffer.pointer, room, read_end, write_end,
            splice_from, most,
        )  # fmt: skip
    if moved < 0:
        raise OSError(-moved, f"copying from {source=} to {target=}: {os.strerror(-moved)}")
    return moved


def copy_memory(target: int, source: int, size: int) -> None:
    """memcpy(3) between two addresses: mapped and not overlapping, or the process dies.

    Only for an engine that maps guest memory on purpose (`--disk ...,io=mmap`).
    """
    lib.pyvmm_copy_memory(target, source, size)
