"""GuestMemory, the "VM fd": guest RAM by guest-physical address, with who may touch which page.

All guest bytes that the host moves go through here. An access names a GPA range; it is refused
as a whole, before a byte moves, unless every page of it is shared RAM.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE, Range, RangeMap
from vmm.memory.backing import Backing, Buffer, byte_count

if TYPE_CHECKING:
    from vmm.memory.engines import Engine


class PageState(Enum):
    """Who may touch a page: guest and host, the guest alone, or (for a moment) nobody.

    A deferred page is private to the guest, and the host does not touch it, but the shared side
    that the guest gave up is still there: its discard has been put off. An observed page is one of
    whose state the host is not told: only trying shows whether it may touch it.
    """

    SHARED = "shared"
    PRIVATE = "private"
    DEFERRED = "deferred"
    CONVERTING = "converting"
    OBSERVED = "observed"


class Residency(NamedTuple):
    """Bytes of host memory behind each side, as the kernel counts them."""

    private_bytes: int
    shared_bytes: int


class GuestMemory:
    """Guest RAM over a shared backing and, for private memory, a private one.

    `ram` are the RAM ranges (page-aligned, ascending, disjoint); `private` are those that start
    as private pages, all other RAM starts shared. One backing given twice stands behind both
    sides (in-place conversion). Safe to use from several threads.

    RAM below `common_end` is *common*: the scheme shows the guest the same memory whether it
    means the private or the shared page, and that memory is the shared backing's. States and
    refusals are as everywhere, but there is no other side that a conversion could discard.
    """

    told = True
    """Whether the host is told of every conversion, so that `states` is what it knows."""
    _open = PageState.SHARED
    """The state in which the host may try to touch a page."""

    def __init__(
        self,
        ram: Sequence[Range],
        shared: Backing,
        private_backing: Backing | None = None,
        private: Sequence[Range] = (),
        common_end: int = 0,
    ) -> None:
        if private and private_backing is None:
            raise ValueError("private ranges need a private backing")
        self.common_end = common_end
        self.ram = tuple(ram)
        self.shared = shared
        self.private = private_backing
        # None stands for "no RAM here", so that one lookup answers both questions.
        self._states: RangeMap[PageState | None] = RangeMap(Range(0, self.ram[-1].end), None)
        for area in self.ram:
            self._states.set(area, self._open)
        for area in private:
            self._states.set(area, PageState.PRIVATE)
        # The pages of a conversion under way; their states change only when it has succeeded.
        self._converting: Range | None = None
        self._lock = threading.Lock()
        self._drained = threading.Condition(self._lock)
        # Accesses under way, by thread: a conversion waits for those that overlap it.
        self._in_flight: dict[int, tuple[int, int]] = {}
        self._waiting = 0

    @property
    def ram_bytes(self) -> int:
        return sum(area.size for area in self.ram)

    # -- the host's accesses ------------------------------------------------------------------

    def pread(self, size: int, gpa: int) -> bytes:
        """`size` bytes of shared guest memory at `gpa`. Raises GuestMemoryError, OSError."""
        self._enter(gpa, size)
        try:
            return self.shared.pread(size, gpa)
        finally:
            self._leave()

    def pwrite(self, data: Buffer, gpa: int) -> None:
        """Write `data` to shared guest memory at `gpa`. Raises GuestMemoryError, OSError."""
        self._enter(gpa, byte_count(data))
        try:
            self.shared.pwrite(data, gpa)
        finally:
            self._leave()

    def preadv(self, buffers: Sequence[bytearray | memoryview], gpa: int) -> None:
        """Fill `buffers` from consecutive shared guest memory at `gpa`, as preadv(2) does."""
        self._enter(gpa, sum(map(byte_count, buffers)))
        try:
            self.shared.preadv(buffers, gpa)
        finally:
            self._leave()

    def pwritev(self, buffers: Sequence[Buffer], gpa: int) -> None:
        """Write `buffers` to consecutive shared guest memory at `gpa`, as pwritev(2) does."""
        self._enter(gpa, sum(map(byte_count, buffers)))
        try:
            self.shared.pwritev(buffers, gpa)
        finally:
            self._leave()

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        """Move bytes of another fd into shared guest memory; short only at the file's end."""
        self._enter(gpa, size)
        try:
            return self.shared.transfer_in(src_fd, src_offset, gpa, size)
        finally:
            self._leave()

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        """Move shared guest memory into another fd; the number of bytes moved."""
        self._enter(gpa, size)
        try:
            return self.shared.transfer_out(gpa, size, dst_fd, dst_offset)
        finally:
            self._leave()

    def read_many(self, pieces: list[int]) -> bytes | bytearray:
        """The bytes of all pieces (gpa, size, gpa, size...) in their order, one after the other."""
        self._enter_many(pieces)
        try:
            return self.shared.read_many(pieces)
        finally:
            self._leave()

    def write_many(self, pieces: list[int], data: bytes) -> None:
        """Write `data` over the pieces (gpa, size, gpa, size...), in their order."""
        self._enter_many(pieces)
        try:
            self.shared.write_many(pieces, data)
        finally:
            self._leave()

    def discard(self, gpa: int, size: int) -> None:
        """Give pages that the guest does without back to the host's kernel, whatever their state:
        the side that the guest uses is punched, and reads as zeros from then on.

        Raises GuestMemoryError for what isn't whole pages of RAM, or is being converted; KvmError.
        """
        area = Range(gpa, size)
        with self._lock:
            if size <= 0 or gpa % PAGE_SIZE or size % PAGE_SIZE or not self.is_ram(area):
                raise UnmappedAccess(f"{size:#x} bytes at {gpa:#x} are not whole pages of RAM")
            converting = self._converting
            if converting is not None and converting.overlaps(area):
                raise PrivateAccess(f"discard of {area}: {converting} is converting")
            runs = self._states_in(area)
            # A conversion of these pages waits until they are gone.
            self._in_flight[threading.get_ident()] = (gpa, gpa + size)
        try:
            for run, state in runs:
                if state is not PageState.PRIVATE:
                    self.discard_shared(run)
                if state is not PageState.SHARED:
                    self.discard_private(run)
        finally:
            self._leave()

    def through(self, engine: Engine) -> MemoryThrough:
        """The same memory, whose transfers go through `engine`."""
        return MemoryThrough(self, engine)

    def _enter(self, gpa: int, size: int) -> None:
        """Hold off conversions of the range until `_leave`, or refuse the access."""
        with self._lock:
            self._require_shared(gpa, size)
            self._in_flight[threading.get_ident()] = (gpa, gpa + size)

    def _enter_many(self, pieces: list[int]) -> None:
        """As `_enter`, for gpa, size, gpa, size...: all of them, or none."""
        if len(pieces) == 2:
            self._enter(*pieces)
            return
        starts, sizes = pieces[::2], pieces[1::2]
        start, end = min(starts), max(starts) + max(sizes)
        with self._lock:
            # Most often all memory that a device uses is one shared run, with room to spare.
            if not self._is_shared(start, end):
                for gpa, size in zip(starts, sizes, strict=True):
                    self._require_shared(gpa, size)
            self._in_flight[threading.get_ident()] = (start, end)

    def _leave(self) -> None:
        with self._lock:
            del self._in_flight[threading.get_ident()]
            if self._waiting:
                self._drained.notify_all()

    def _require_shared(self, gpa: int, size: int) -> None:
        if size < 0 or not self._in_span(gpa, size):
            raise UnmappedAccess(f"host access to {size} bytes at {gpa:#x} is outside guest RAM")
        if self._is_shared(gpa, gpa + size):
            return
        for area, state in self._runs(Range(gpa, max(size, 1))):
            if state is None:
                raise UnmappedAccess(
                    f"host access to {size} bytes at {gpa:#x}: no guest RAM at {area}"
                )
            if state is not self._open:
                raise PrivateAccess(
                    f"host access to {size} bytes at {gpa:#x}: {area} is {state.value}"
                )

    def _is_shared(self, start: int, end: int) -> bool:
        """Whether [start, end) is shared RAM, and no part of it is being converted; lock held."""
        converting = self._converting
        return (
            start >= 0
            and end <= self._states.span.end
            and self._states.is_uniform(start, end, self._open)
            and (converting is None or converting.end <= start or end <= converting.start)
        )

    def _in_span(self, gpa: int, size: int) -> bool:
        return gpa >= 0 and gpa + max(size, 1) <= self._states.span.end

    def _runs(self, within: Range | None) -> Iterator[tuple[Range, PageState | None]]:
        """The runs of pages in equal state, those under conversion set apart; lock held."""
        middle = self._converting
        if middle is not None:
            middle = middle if within is None else middle.intersection(within)
        if middle is None:
            yield from self._states.runs(within)
            return
        span = self._states.span if within is None else within
        yield from self._states.runs(Range(span.start, middle.start - span.start))
        yield middle, PageState.CONVERTING
        yield from self._states.runs(Range(middle.end, span.end - middle.end))

    # -- page states, for conversions ---------------------------------------------------------

    def states(self, within: Range | None = None) -> list[tuple[Range, PageState]]:
        """The runs of RAM pages in equal state, in address order; holes are left out."""
        with self._lock:
            return [(area, state) for area, state in self._runs(within) if state is not None]

    def bytes_in(self, state: PageState) -> int:
        """How many bytes of RAM are in `state`."""
        return sum(area.size for area, held in self.states() if held is state)

    def is_ram(self, area: Range) -> bool:
        """Whether every byte of `area` is guest RAM."""
        return any(ram.contains(area) for ram in self.ram)

    def begin_conversion(self, area: Range) -> list[tuple[Range, PageState]]:
        """Take `area` (page-aligned RAM) away from the host; the states that its pages are in.

        From here on host accesses raise; those under way are waited for by `quiesce`. One
        conversion at a time, ended by `finish_conversion` or `abandon_conversion`.
        """
        with self._lock:
            if self._converting is not None:
                raise RuntimeError(f"{area}: {self._converting} is being converted already")
            inside = self._states.span.contains(area)
            before = self._states_in(area) if inside else []
            if sum(run.size for run, _ in before) != area.size:
                raise UnmappedAccess(f"{area} is not wholly guest RAM")
            self._converting = area
            return before

    def _states_in(self, area: Range) -> list[tuple[Range, PageState]]:
        """The runs of RAM pages in equal state, none of them under conversion; lock held."""
        state = self._states.get(area.start)
        if state is not None and self._states.is_uniform(area.start, area.end, state):
            return [(area, state)]
        return [(run, held) for run, held in self._states.runs(area) if held is not None]

    def quiesce(self, area: Range, timeout: float) -> bool:
        """Wait (seconds) until no host access to `area` is under way; False if time ran out."""

        def drained() -> bool:
            flights = self._in_flight.values()
            return not any(start < area.end and area.start < end for start, end in flights)

        with self._lock:
            if not self._in_flight:
                return True
            self._waiting += 1
            try:
                return self._drained.wait_for(drained, timeout)
            finally:
                self._waiting -= 1

    def finish_conversion(self, state: PageState, runs: Sequence[Range] | None = None) -> None:
        """The conversion succeeded: its pages (or `runs` of them) are in `state` now."""
        with self._lock:
            if self._converting is not None:
                for area in (self._converting,) if runs is None else runs:
                    self._states.set(area, state)
            self._converting = None

    def abandon_conversion(self) -> None:
        """The conversion failed, or there was nothing to do: its pages are what they were."""
        with self._lock:
            self._converting = None

    @property
    def in_place(self) -> bool:
        """Whether one backing stands behind both sides: discarding either discards the page."""
        return self.private is self.shared

    def discard_private(self, area: Range) -> None:
        """Give the private side's pages of `area` back to the host's kernel. Raises KvmError."""
        if self.private is not None:
            self.private.punch(area.start, area.size)

    def discard_shared(self, area: Range) -> None:
        """Give the shared side's pages of `area` back to the host's kernel, except common ones,
        whose only side it is. Raises KvmError."""
        start = max(area.start, self.common_end)
        if start < area.end:
            self.shared.punch(start, area.end - start)

    def residency(self) -> Residency:
        """What the kernel holds for either side right now."""
        private = 0 if self.private is None else self.private.resident_bytes()
        if not self.in_place:
            return Residency(private, self.shared.resident_bytes())
        runs = [run for run, state in self.states() if state is PageState.SHARED]
        shared = sum(self.shared.resident_bytes(run.start, run.size) for run in runs)
        return Residency(private - shared, shared)

    def accounted(self) -> dict[str, int | None]:
        """`residency` for people and reports; None stands for what nobody knows."""
        return dict(self.residency()._asdict())

    def launched(self) -> None:
        """Everything is loaded, and the guest about to run."""

    def close(self) -> None:
        self.shared.close()
        if self.private is not None:
            self.private.close()


class MemoryThrough:
    """Guest memory as one device sees it: GuestMemory checks, an engine moves the bytes."""

    def __init__(self, memory: GuestMemory, engine: Engine) -> None:
        self._memory = memory
        self._engine = engine
        self.pread, self.pwrite, self.discard = memory.pread, memory.pwrite, memory.discard
        self.read_many, self.write_many = memory.read_many, memory.write_many

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        """Move bytes of a file into guest memory: file offset, gpa, size, file offset...

        All of it is refused before a byte moves (GuestMemoryError), or the number of bytes is
        what was asked for, unless the file ends. Raises OSError with some of it moved.
        """
        return self._move(moves, 1, lambda: self._engine.move_in(src_fd, moves))

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        """Move guest memory into a file: gpa, file offset, size, gpa... As `move_in`."""
        return self._move(moves, 0, lambda: self._engine.move_out(moves, dst_fd))

    def _move(self, moves: list[int], gpas: int, move: Callable[[], int]) -> int:
        pieces = [0] * (len(moves) // 3 * 2)
        pieces[::2], pieces[1::2] = moves[gpas::3], moves[2::3]
        self._memory._enter_many(pieces)
        try:
            return move()
        finally:
            self._memory._leave()

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        self._memory._enter(gpa, size)
        try:
            return self._engine.transfer_in(src_fd, src_offset, gpa, size)
        finally:
            self._memory._leave()

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        self._memory._enter(gpa, size)
        try:
            return self._engine.transfer_out(gpa, size, dst_fd, dst_offset)
        finally:
            self._memory._leave()


class LaunchMemory:
    """Guest memory as a loader sees it before the guest runs: private pages can be filled.

    The counterpart of a launch update on confidential hardware. `seal` ends it for good.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._sealed = False
        self.written: list[Range] = []
        """What was filled, in the order of the calls: the only pages that exist at launch."""

    def pwrite(self, data: Buffer, gpa: int) -> None:
        """Write `data` at `gpa`, to the side that the guest will see there."""
        view = memoryview(data).cast("B")
        for area, backing in self._runs(gpa, len(view)):
            backing.pwrite(view[area.start - gpa : area.end - gpa], area.start)

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        """Move bytes of a file to `gpa`, fd to fd; short only at the file's end."""
        done = 0
        for area, backing in self._runs(gpa, size):
            moved = backing.transfer_in(src_fd, src_offset + done, area.start, area.size)
            done += moved
            if moved < area.size:
                break
        return done

    def seal(self) -> None:
        """The guest is about to run: private pages are its own from now on."""
        self._sealed = True
        self._memory.launched()

    def _runs(self, gpa: int, size: int) -> list[tuple[Range, Backing]]:
        if self._sealed:
            raise PrivateAccess(f"write of {size} bytes at {gpa:#x} after the guest's launch")
        if size == 0:
            return []
        area = Range(gpa, size)
        if gpa < 0 or not self._memory.is_ram(area):
            raise UnmappedAccess(f"{area} does not fit into guest RAM; give the guest more --mem")
        memory = self._memory
        runs: list[tuple[Range, Backing]] = []
        for run, state in memory.states(area):
            if state is not PageState.PRIVATE or memory.private is None:
                runs.append((run, memory.shared))
                continue
            common, own = run.split(memory.common_end)
            runs += [(common, memory.shared)] if common.size else []
            runs += [(own, memory.private)] if own.size else []
        self.written.append(area)
        return runs
