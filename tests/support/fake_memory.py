"""Guest memory for device tests: one memfd, the verbs of GuestMemory, ranges that refuse."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.core.ranges import Range


class FakeMemory:
    """`size` bytes from address 0. `private` ranges refuse the host; `calls` counts verbs.

    `before` is called ahead of each verb with its name and address, for tests in which
    something happens in the middle of a request.
    """

    def __init__(self, size: int = 1 << 20) -> None:
        self.size = size
        self.private: list[Range] = []
        self.calls: Counter[str] = Counter()
        self.before: Callable[[str, int], None] | None = None
        self._fd = os.memfd_create("fake-guest-memory", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        os.close(self._fd)

    def pread(self, size: int, gpa: int) -> bytes:
        self._check("pread", size, gpa)
        return os.pread(self._fd, size, gpa)

    def pwrite(self, data: bytes | memoryview, gpa: int) -> None:
        self._check("pwrite", len(data), gpa)
        os.pwrite(self._fd, data, gpa)

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        self._check("transfer_in", size, gpa)
        return os.pwrite(self._fd, os.pread(src_fd, size, src_offset), gpa)

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        self._check("transfer_out", size, gpa)
        return os.pwrite(dst_fd, os.pread(self._fd, size, gpa), dst_offset)

    def discard(self, gpa: int, size: int) -> None:
        self._check("discard", size, gpa)
        os.pwrite(self._fd, bytes(size), gpa)

    def peek(self, size: int, gpa: int) -> bytes:
        """What the guest sees there: no checks, not counted."""
        return os.pread(self._fd, size, gpa)

    def poke(self, data: bytes, gpa: int) -> None:
        """What the guest writes there."""
        os.pwrite(self._fd, data, gpa)

    def _check(self, verb: str, size: int, gpa: int) -> None:
        self.calls[verb] += 1
        if self.before is not None:
            self.before(verb, gpa)
        if gpa < 0 or size < 0 or gpa + size > self.size:
            raise UnmappedAccess(f"{verb} of {size:#x} bytes at {gpa:#x}: no memory")
        wanted = Range(gpa, size)
        if any(wanted.overlaps(held) for held in self.private):
            raise PrivateAccess(f"{verb} of {size:#x} bytes at {gpa:#x}: private")


class BatchingFakeMemory(FakeMemory):
    """The same with verbs for many pieces, as GuestMemory has them."""

    quiet = True  # as MemoryThrough says

    def read_many(self, pieces: list[int]) -> bytes:
        self._check_many("read_many", pieces)
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        return b"".join([os.pread(self._fd, size, gpa) for gpa, size in pairs])

    def write_many(self, pieces: list[int], data: bytes) -> None:
        self._check_many("write_many", pieces)
        done = 0
        for gpa, size in zip(pieces[::2], pieces[1::2], strict=True):
            os.pwrite(self._fd, data[done : done + size], gpa)
            done += size

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        self._check_many("move_in", [n for i, n in enumerate(moves) if i % 3])
        return self._move(src_fd, self._fd, moves)

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        self._check_many("move_out", [n for i, n in enumerate(moves) if i % 3 != 1])
        return self._move(self._fd, dst_fd, moves)

    def _move(self, src: int, dst: int, moves: list[int]) -> int:
        total = 0
        for start, end, size in zip(moves[::3], moves[1::3], moves[2::3], strict=True):
            moved = os.pwrite(dst, os.pread(src, size, start), end)
            total += moved
            if moved < size:
                break
        return total

    def _check_many(self, verb: str, pieces: list[int]) -> None:
        calls = self.calls.copy()
        for gpa, size in zip(pieces[::2], pieces[1::2], strict=True):
            self._check(verb, size, gpa)
        self.calls = calls
        self.calls[verb] += 1
