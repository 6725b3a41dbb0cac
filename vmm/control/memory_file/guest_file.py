"""Guest memory with the semantics of a sparse file: what is shared is there, the rest is refused.

An offset is a guest-physical address. Errors are OSErrors, as read(2) and write(2) have them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from vmm.core.errors import GuestMemoryError
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.memory.handing_out import HandingOut

if TYPE_CHECKING:
    from vmm.control.memory_file.libfuse import Answer

Announce = Callable[[Range, bool, str | None], None]
_OPEN = (PageState.SHARED, PageState.OBSERVED)
_BY_ADDRESS = 16 << 10
"""Bytes from which on an answer out of the mapping is quicker than a copy of ours."""


class GuestFile:
    """One guest's memory. Safe to use from several threads."""

    def __init__(self, memory: GuestMemory, shared_bit: int = 0) -> None:
        """`shared_bit` is what the scheme wants in the address of a shared page, if anything."""
        self._memory = memory
        self._bit = shared_bit
        self.size = memory.ram[-1].end
        """Bytes: the end of RAM. Holes of RAM are holes of the file."""
        self._handing_out = HandingOut(memory)
        self.counts = {"reads": 0, "writes": 0, "bytes_read": 0, "bytes_written": 0, "refused": 0}

    def read(self, size: int, offset: int, announce: Announce | None, answer: Answer) -> None:
        """Answer with up to `size` bytes from `offset` on. As `read_into`."""
        size = max(0, min(size, self.size - offset))
        if announce is None and size >= _BY_ADDRESS and self._handing_out.can():
            try:
                done = self._handing_out.give(offset | self._bit, size, answer.at)
            except GuestMemoryError:
                done = False  # not all of it may be read: as far as it goes, below
            if done:
                self.counts["reads"] += 1
                self.counts["bytes_read"] += size
                return
        buffer = memoryview(bytearray(size))
        answer.data(buffer[: self.read_into(buffer, offset, announce)])

    def read_into(self, buffer: memoryview, offset: int, announce: Announce | None) -> int:
        """Fill the buffer from `offset` on; how many bytes came before the first that is refused.

        Raises OSError where that is the first: EACCES for a page that isn't shared or that a
        policy keeps the reader off, EFAULT where there is no RAM. 0 at the file's end.
        """

        def move(gpa: int, start: int, end: int) -> None:
            self._memory.preadv([buffer[start:end]], gpa)

        done = self._move(len(buffer), offset, announce, False, move)
        self.counts["reads"] += 1
        self.counts["bytes_read"] += done
        return done

    def write(self, data: memoryview, offset: int, announce: Announce | None) -> int:
        """As `read_into`. Past the end nothing can be written: ENOSPC."""

        def move(gpa: int, start: int, end: int) -> None:
            self._memory.pwritev([data[start:end]], gpa)

        if len(data) and offset >= self.size:
            raise OSError(errno.ENOSPC, "guest memory ends there")
        done = self._move(len(data), offset, announce, True, move)
        self.counts["writes"] += 1
        self.counts["bytes_written"] += done
        return done

    def _move(
        self,
        size: int,
        offset: int,
        announce: Announce | None,
        is_write: bool,
        move: Callable[[int, int, int], None],
    ) -> int:
        size = min(size, self.size - offset)
        if size <= 0:
            return 0
        if announce is None:
            try:
                move(offset | self._bit, 0, size)
                return size
            except GuestMemoryError:
                pass
        # What there is of it before the first page that is refused. States may change meanwhile,
        # so that each piece is tried, and the first refusal ends it.
        done = 0
        refusal: GuestMemoryError | None = None
        for area in self._open_pieces(Range(offset, size)):
            if area.start != offset + done:
                break
            try:
                if announce is not None:
                    announce(area, is_write, None)
                move(area.start | self._bit, done, done + area.size)
            except GuestMemoryError as error:
                refusal = error
                break
            except OSError:
                if not done:
                    raise
                break  # what was moved before has been moved
            done += area.size
        if not done:
            self.counts["refused"] += 1
            is_ram = self._memory.is_ram(Range(offset, 1))
            raise OSError(
                errno.EACCES if is_ram else errno.EFAULT,
                str(refusal or f"{offset:#x} is not shared"),
            )
        return done

    def _open_pieces(self, area: Range) -> list[Range]:
        """What may be touched, as far as one knows: runs, or pages where nobody is told."""
        runs = [run for run, state in self._memory.states(area) if state in _OPEN]
        if self._memory.told:
            return runs
        pieces = []
        for run in runs:
            at = run.start
            while at < run.end:
                end = min((at // PAGE_SIZE + 1) * PAGE_SIZE, run.end)
                pieces.append(Range(at, end - at))
                at = end
        return pieces

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE: shared runs are data, all else is a hole. Raises OSError
        (ENXIO where there is nothing more)."""
        if not 0 <= offset < self.size:
            raise OSError(errno.ENXIO, "no such offset")
        states = self._memory.states(Range(offset, self.size - offset))
        data = [run for run, state in states if state in _OPEN]
        if whence == os.SEEK_DATA:
            if not data:
                raise OSError(errno.ENXIO, "no shared memory from there on")
            return data[0].start
        if whence != os.SEEK_HOLE:
            raise OSError(errno.EINVAL, "neither SEEK_DATA nor SEEK_HOLE")
        at = offset
        for run in data:
            if run.start > at:
                break
            at = run.end
        return at

    @property
    def data_bytes(self) -> int:
        """How much of it is there: what the host may touch."""
        return sum(self._memory.bytes_in(state) for state in _OPEN)

    @property
    def changes(self) -> int:
        """Counts the changes of page states."""
        return self._memory.changes

    def states_text(self) -> bytes:
        """A line for each run of equal state, of this moment: start, size and state."""
        states = self._memory.states()
        return b"".join(
            b"%#018x %#x %s\n" % (run.start, run.size, state.value.encode())
            for run, state in states
        )
