"""Moves bytes from one fd to another at explicit offsets, without user space where possible.

The kernel offers two ways: splice(2) through a pipe, which some files refuse, and read and write
through a buffer. copy_file_range(2) would be a third one, but a memfd's file system has none of
its own: between file systems it is refused, within shared memory it is a splice.
"""

from __future__ import annotations

import errno
import os
import threading

from kvm_bindings import datapath

ENGINES = ("auto", "pread", "fd2fd", "vmfd", "hva", "mmap")
"""What `vmm.memory.engines` makes: the ways a disk's bytes may go."""

_CHUNK = 1 << 20
UNINTERRUPTED = 16 << 20
# Below this size one pread and one pwrite are as quick as two splices and touch fewer pages.
SPLICE_FROM = 64 << 10
SLOW_NS = 3_000_000
"""What `copy_many` doesn't begin another move after: a device's turn is to be over by then."""

_NOT_THIS_WAY = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS})


class _Scratch:
    """One pipe and one buffer: each thread's own, so that a transfer never waits for another's."""

    def __init__(self) -> None:
        self.pipe: tuple[int, int] | None = None
        self.buffer: datapath.Buffer | None = None

    def pipe_ends(self) -> tuple[int, int]:
        if self.pipe is None:
            import fcntl  # once a thread, where something is spliced

            self.pipe = os.pipe2(os.O_CLOEXEC)
            try:
                fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, _CHUNK)
            except PermissionError:
                return self.pipe  # the user's pipe quota is used up: the default size serves
        return self.pipe

    def drop_pipe(self) -> None:
        """Close a pipe that still holds bytes of a failed transfer."""
        if self.pipe is not None:
            os.close(self.pipe[0])
            os.close(self.pipe[1])
            self.pipe = None

    def bounce(self) -> datapath.Buffer:
        if self.buffer is None:
            self.buffer = datapath.Buffer(_CHUNK)
        return self.buffer

    def __del__(self) -> None:
        self.drop_pipe()


class _Scratches(threading.local):
    """Each thread's scratch, which goes with the thread."""

    def __init__(self) -> None:
        # An object of its own: a thread.local's own __del__ doesn't run when one of its threads
        # ends, but what the thread had in it is dropped.
        self.own = _Scratch()


_scratches = _Scratches()


def copy_through_buffer(src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> int:
    """pread and pwrite through one reused buffer; bytes moved, short only at end of file."""
    return _copy(src, src_offset, dst, dst_offset, size, (-1, -1), datapath.NEVER)


def copy_by_splice(src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> int:
    """splice(2) through this thread's pipe; bytes moved, short only at end of file."""
    scratch = _scratches.own
    try:
        return _copy(src, src_offset, dst, dst_offset, size, scratch.pipe_ends(), 0)
    except OSError:
        scratch.drop_pipe()  # the next transfer must not find these bytes
        raise


def _copy(
    src: int,
    src_offset: int,
    dst: int,
    dst_offset: int,
    size: int,
    pipe: tuple[int, int],
    splice_from: int,
) -> int:
    done = 0
    buffer = _scratches.own.bounce()
    while True:
        # In parts, because no signal's handler runs while C copies.
        part = min(size - done, UNINTERRUPTED)
        moves = [src_offset + done, dst_offset + done, part]
        moved = datapath.move_many(src, dst, moves, buffer, pipe, splice_from)
        done += moved
        if moved < part or done == size:
            return done


def _carried_out(sizes: list[int], moved: int) -> list[int]:
    """How much of each move was carried out when so many bytes were moved in all."""
    parts = []
    for size in sizes:
        parts.append(min(size, moved))
        moved -= parts[-1]
    return parts


def _between(src: int, dst: int) -> tuple[int, int]:
    """The two files' file systems."""
    return os.fstat(src).st_dev, os.fstat(dst).st_dev


class FdCopier:
    """Copies between fds, remembering which way works between which two file systems.

    `splice_from`: transfers of that many bytes or more stay inside the kernel where it can;
    None: none do. `bytes_by` counts bytes by way, `fallbacks` the transfers that should have
    stayed inside the kernel and went through the buffer.
    """

    def __init__(self, splice_from: int | None = SPLICE_FROM) -> None:
        self._splice_from = splice_from
        self._no_splice: set[tuple[int, int]] = set()
        self._counting = threading.Lock()
        self.bytes_by = {"splice": 0, "buffer": 0}
        self.fallbacks = 0

    def copy(self, src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> int:
        """Copy `size` bytes; the number moved, which is short only at the source's end.

        Raises OSError as the system calls do (EIO, ENOSPC...).
        """
        inside = self._splice_from is not None and size >= self._splice_from
        moved = self._inside_kernel(src, src_offset, dst, dst_offset, size) if inside else None
        if moved is None:
            moved = copy_through_buffer(src, src_offset, dst, dst_offset, size)
            self._count("buffer", moved, fell_back=inside)
        return moved

    def copy_many(self, src: int, dst: int, moves: list[int]) -> int:
        """As `copy`, for source offset, target offset, size, source offset...: bytes moved.

        They are short also where the host is so slow that the caller had better look around
        before it asks for the rest (SLOW_NS). Raises OSError, with some of it moved.
        """
        sizes, wanted = moves[2::3], self._splice_from
        splice_from = datapath.NEVER
        if wanted is not None and max(sizes) < wanted:
            wanted = None  # nothing of it is large
        if wanted is not None and not self._is_refused(src, dst):
            splice_from = wanted
        scratch = _scratches.own
        try:
            moved = datapath.move_many(
                src, dst, moves, scratch.bounce(), scratch.pipe_ends(), splice_from, SLOW_NS
            )
        except OSError as error:
            scratch.drop_pipe()  # it may hold bytes
            if error.errno not in _NOT_THIS_WAY or splice_from == datapath.NEVER:
                raise
            self._no_splice.add(_between(src, dst))
            return self.copy_many(src, dst, moves)
        # If it is short the caller asks for the rest, and finds out if the file is.
        parts = sizes if moved == sum(sizes) else _carried_out(sizes, moved)
        pairs = zip(sizes, parts, strict=True)
        inside = fell_back = 0
        if splice_from != datapath.NEVER:
            inside = sum([part for size, part in pairs if size >= splice_from])
        elif wanted is not None:
            fell_back = sum([size >= wanted and part > 0 for size, part in pairs])
        with self._counting:
            self.bytes_by["splice"] += inside
            self.bytes_by["buffer"] += moved - inside
            self.fallbacks += fell_back
        return moved

    def _inside_kernel(
        self, src: int, src_offset: int, dst: int, dst_offset: int, size: int
    ) -> int | None:
        """As `copy`, or None where splice doesn't work between these two files."""
        if self._is_refused(src, dst):
            return None
        try:
            moved = copy_by_splice(src, src_offset, dst, dst_offset, size)
        except OSError as error:
            if error.errno not in _NOT_THIS_WAY:
                raise
            self._no_splice.add(_between(src, dst))
            return None
        self._count("splice", moved)
        return moved

    def _is_refused(self, src: int, dst: int) -> bool:
        return bool(self._no_splice) and _between(src, dst) in self._no_splice

    def _count(self, way: str, moved: int, *, fell_back: bool = False) -> None:
        with self._counting:
            self.bytes_by[way] += moved
            self.fallbacks += fell_back
