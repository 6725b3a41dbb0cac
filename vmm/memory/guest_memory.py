"""GuestMemory, the "VM fd": guest RAM by guest-physical address, with who may touch which page.

All guest bytes that the host moves go through here. An access names a GPA range; it is refused
as a whole, before a byte moves, unless every page of it is shared RAM.
"""

from __future__ import annotations

import errno
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from threading import get_ident

from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.core.lean_typing import TYPE_CHECKING, Enum, NamedTuple, cast
from vmm.core.ranges import NOWHERE, PAGE_SIZE, Cut, Range, RangeMap
from vmm.memory.backing import Backing, Buffer, byte_count

if TYPE_CHECKING:
    from vmm.memory.engines import Engine

MOST_RUNS = 1 << 15
"""How many runs of pages in equal state a guest may make, for whatever walks them is as long.

A stock Linux gets by with hundreds. A guest that shares every second page is refused with ENOSPC
beyond, before it has made the books of a few GiB megabytes long.
"""

_RUNS_AT_ONCE = 512
"""How many runs change with the lock held; who waits for it has a turn in between."""


class PageState(Enum):
    """Who may touch a page: guest and host, the guest alone, or (for a moment) nobody.

    A deferred page is private to the guest, and the host does not touch it, but the shared side
    that the guest gave up is still there: its discard has been put off. An observed page is one of
    whose state the host is not told: only trying shows whether it may touch it. A lent page is
    private, too, but the device that the guest's virtual IOMMU maps it for may touch it
    (`vmm.memory.lending`).
    """

    SHARED = "shared"
    PRIVATE = "private"
    DEFERRED = "deferred"
    LENT = "lent"
    CONVERTING = "converting"
    OBSERVED = "observed"


class Residency(NamedTuple):
    """Bytes of host memory behind each side, as the kernel counts them."""

    private_bytes: int
    shared_bytes: int


Runs = list[tuple[Range, PageState]]
Flight = tuple[int, int, list[int] | None]
"""A host access under way: where it starts and ends, and its pieces (gpa, size, gpa, size...) if
there are several."""


class _Conversion:
    """Pages on their way to another state, which they have only once all has succeeded."""

    __slots__ = ("_held", "_runs", "area", "is_uniform", "target")

    def __init__(self, area: Range, target: PageState | None, runs: Runs | Cut[PageState]) -> None:
        """`runs`: the states before, as a list or as what they can be listed from."""
        self.area = area
        self.target = target
        self._runs = runs
        self._held: dict[PageState, int] | None = None
        self.is_uniform = runs.__class__ is list and len(runs) == 1
        """Whether all of its pages are in one state before."""

    # Both are worked out when they are first asked for, which is without memory's lock: a guest
    # can make them long. Two threads may do it at once, and come to the same.

    @property
    def runs(self) -> Runs:
        """The states that the pages are in while they are converted."""
        if isinstance(self._runs, Cut):
            self._runs = list(RangeMap.of(self._runs).runs())
        return self._runs

    def held(self, state: PageState) -> int:
        """How many of the bytes are in `state` before."""
        if self._held is None:
            held = dict.fromkeys(PageState, 0)
            for run, each in self.runs:
                held[each] += run.size
            self._held = held
        return self._held[state]

    def advanced(self, address: int) -> _Conversion:
        """What is left of it when the pages below `address` have their state."""
        first = bisect_right(self.runs, address, key=lambda run: run[0].start) - 1
        left = self.runs[first:]
        left[0] = (left[0][0].split(address)[1], left[0][1])
        left = left if left[0][0].size else left[1:]
        return _Conversion(self.area.split(address)[1], self.target, left)


class GuestMemory:
    """Guest RAM over a shared backing and, for private memory, a private one.

    `ram` are the RAM ranges (page-aligned, ascending, disjoint); `private` are those that start
    as private pages, all other RAM starts shared. One backing given twice stands behind both
    sides (in-place conversion). Safe to use from several threads.

    RAM in `common` is *common*: the scheme shows the guest the same memory whether it
    means the private or the shared page, and that memory is the shared backing's. States and
    refusals are as everywhere, but there is no other side that a conversion could discard.
    """

    told = True
    """Whether the host is told of every conversion, so that `states` is what it knows."""
    shared_bit = 0
    """What a device's address of a shared page carries (`vmm.memory.aliased_memory`)."""
    _open = PageState.SHARED
    """The state in which the host may try to touch a page."""

    def __init__(
        self,
        ram: Sequence[Range],
        shared: Backing,
        private_backing: Backing | None = None,
        private: Sequence[Range] = (),
        common: Range = NOWHERE,
    ) -> None:
        if private and private_backing is None:
            raise ValueError("private ranges need a private backing")
        self.common = common
        self.ram = tuple(ram)
        self.shared = shared
        self.private = private_backing
        # None stands for "no RAM here", so that one lookup answers both questions.
        self._states: RangeMap[PageState | None] = RangeMap(Range(0, self.ram[-1].end), None)
        for area in self.ram:
            self._states.set(area, self._open)
        for area in private:
            self._states.set(area, PageState.PRIVATE)
        self._end = self.ram[-1].end
        # Conversions under way, by the thread that carries them out; none overlaps another.
        self._conversions: dict[int, _Conversion] = {}
        # A run that the host may touch, [start, end), in which accesses need no look at the
        # states: as long as nothing has been converted since it was found. With the lock held.
        self._free = 0, 0
        self._lock = threading.Lock()
        self._drained = threading.Condition(self._lock)
        # Accesses under way, by thread: a conversion waits for those that have a piece of it.
        self._in_flight: dict[int, Flight] = {}
        self._waiting = 0
        self.changes = 0
        """How often page states have changed."""
        self.on_change: Callable[[], None] | None = None
        """Told of each change, in the middle of it: it must not wait, nor use memory."""

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
            if self._conversions and (converting := self._converting_in(area)) is not None:
                raise PrivateAccess(f"discard of {area}: {converting} is converting")
            cut = self._states.cut(area)
            # A conversion of these pages waits until they are gone.
            self._in_flight[threading.get_ident()] = (gpa, gpa + size, None)
        try:
            for run, state in [] if cut is None else RangeMap.of(cut).runs():
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
        end = gpa + size
        with self._lock:
            low, high = self._free
            if not (low <= gpa < high and gpa <= end <= high):
                self._require_shared(gpa, size)
                self._note_free(gpa)
            self._in_flight[get_ident()] = (gpa, end, None)

    def _enter_many(self, pieces: list[int]) -> None:
        """As `_enter`, for gpa, size, gpa, size...: all of them, or none.

        `pieces` stay the caller's, who does not change them before `_leave`.
        """
        if len(pieces) == 2:
            self._enter(pieces[0], pieces[1])
            return
        starts, sizes = pieces[::2], pieces[1::2]
        start, end = min(starts), max(starts) + max(sizes)
        with self._lock:
            low, high = self._free
            # Most often all memory that a device uses is one shared run, with room to spare.
            if not (low <= start and end <= high):
                if not self._is_shared(start, end):
                    for gpa, size in zip(starts, sizes, strict=True):
                        self._require_shared(gpa, size)
                self._note_free(start)
            self._in_flight[get_ident()] = (start, end, pieces)

    def _note_free(self, gpa: int) -> None:
        """An access at `gpa` was allowed: so are others in the same run."""
        if not self._conversions:
            self._free = self._states.run_at(gpa)

    def _leave(self) -> None:
        with self._lock:
            del self._in_flight[get_ident()]
            if self._waiting:
                self._drained.notify_all()

    def _require_shared(self, gpa: int, size: int) -> None:
        if size < 0 or not self._in_span(gpa, size):
            raise UnmappedAccess(f"host access to {size} bytes at {gpa:#x} is outside guest RAM")
        if self._is_shared(gpa, gpa + size):
            return
        access = Range(gpa, max(size, 1))
        converting = self._converting_in(access)
        if converting is not None:
            raise PrivateAccess(
                f"host access to {size} bytes at {gpa:#x}: {converting} is converting"
            )
        # The first of maximal runs that isn't shared is the first or the second.
        for area, state in self._states.runs(access):
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
        return (
            start >= 0
            and end <= self._states.span.end
            and self._states.is_uniform(start, end, self._open)
            and not (
                self._conversions
                and self._converting_in(Range(start, max(end - start, 1))) is not None
            )
        )

    def _converting_in(self, area: Range) -> Range | None:
        """What part of `area` is being converted, the first if there are several; lock held."""
        found = [each.area.intersection(area) for each in self._conversions.values()]
        return min((part for part in found if part is not None), default=None)

    def _in_span(self, gpa: int, size: int) -> bool:
        return gpa >= 0 and gpa + max(size, 1) <= self._states.span.end

    # -- page states, for conversions ---------------------------------------------------------

    def snapshot(self, within: Range | None = None) -> RangeMap[PageState | None] | None:
        """The states of all addresses, or of those `within` a range, at one moment.

        None stands for what isn't RAM; there is no snapshot of a range outside of all. Costs a
        copy of the runs with the lock held, and everything else without it.
        """
        with self._lock:
            cut = self._states.cut(within)
            converting = [each.area for each in self._conversions.values()]
        if cut is None:
            return None
        made = RangeMap.of(cut)
        for area in converting:
            inside = area.intersection(made.span)
            if inside is not None:
                made.set(inside, PageState.CONVERTING)
        return made

    def states(self, within: Range | None = None) -> list[tuple[Range, PageState]]:
        """The runs of RAM pages in equal state, in address order; holes are left out."""
        if within is not None:
            start, size = within
            with self._lock:
                if size > 0 and start >= 0 and start + size <= self._end and not self._conversions:
                    state = self._states.uniform(start, start + size)
                    if state is not None:  # what most questions are about
                        return [(within, state)]
        found = self.snapshot(within)
        if found is None:
            return []
        return [(area, state) for area, state in found.runs() if state is not None]

    def bytes_in(self, state: PageState) -> int:
        """How many bytes of RAM are in `state`; costs nothing that a guest could make longer."""
        with self._lock:
            total, conversions = self._states.total(state), list(self._conversions.values())
        if state is PageState.CONVERTING:
            return sum(each.area.size for each in conversions)
        return total - sum(each.held(state) for each in conversions)

    def most_bytes_in(self, state: PageState) -> int:
        """How many bytes of RAM may be in `state` once the conversions under way have ended.

        Each of them may succeed or fail, so that its pages count for the state which they leave
        as well as for the one that they are to have.
        """
        if not self._conversions:  # as nearly always: one number, read at once
            return self._states.total(state)
        with self._lock:
            total, conversions = self._states.total(state), list(self._conversions.values())
        coming = [each for each in conversions if each.target is state]
        return total + sum(each.area.size - each.held(state) for each in coming)

    def is_ram(self, area: Range) -> bool:
        """Whether every byte of `area` is guest RAM."""
        start, size = area
        for ram in self.ram:  # noqa: SIM110 - any() takes three times as long
            if ram.start <= start and start + size <= ram.start + ram.size:
                return True
        return False

    def is_converting(self, area: Range) -> bool:
        """Whether a page of `area` is being converted."""
        if not self._conversions:
            return False
        with self._lock:
            return self._converting_in(area) is not None

    def begin_conversion(
        self, area: Range, target: PageState | None = None
    ) -> list[tuple[Range, PageState]]:
        """Take `area` (page-aligned RAM) away from the host; the states that its pages are in.

        From here on host accesses raise; those under way are waited for by `quiesce`. Ended by
        `finish_conversion` or `abandon_conversion` on the same thread, which begins no other
        before. Conversions by several threads go side by side; the caller sees to it that they
        don't overlap.

        `target`: the state that the pages are to have. Raises OSError (ENOSPC) where that would
        make more runs than MOST_RUNS.
        """
        thread = threading.get_ident()
        with self._lock:
            if self._conversions:
                self._require_none_converting(thread, area)
            states = self._states
            start, size = area
            state = None
            if start >= 0 and start + size <= self._end:
                state = states.uniform(start, start + size)
            runs: Runs | Cut[PageState]
            if state is not None:
                runs = [(area, state)]
            elif self.is_ram(area):
                cut = states.cut(area)
                runs = cast("Cut[PageState]", cut)
            else:
                raise UnmappedAccess(f"{area} is not wholly guest RAM")
            if target is not None and len(states) > MOST_RUNS - 2:
                self._require_room(area, target)
            self._free = 0, 0
            conversion = self._conversions[thread] = _Conversion(area, target, runs)
        return conversion.runs

    def _require_none_converting(self, thread: int, area: Range) -> None:
        mine = self._conversions.get(thread)
        taken = self._converting_in(area) if mine is None else mine.area
        if taken is not None:
            raise RuntimeError(f"{area}: {taken} is being converted already")

    def _require_room(self, area: Range, target: PageState) -> None:
        count = len(self._states) + self._states.growth(area, target)
        if count > max(MOST_RUNS, len(self._states)):
            raise OSError(
                errno.ENOSPC,
                f"{count} runs of pages in equal state, and {MOST_RUNS} are the most; let the "
                "guest convert larger ranges",
            )

    def quiesce(self, area: Range, timeout: float) -> bool:
        """Wait (seconds) until no host access to `area` that is under way now is left; False if
        time ran out. While `area` is being converted, no other can begin."""
        if not self._in_flight:
            return True
        with self._lock:
            flights = list(self._in_flight.items())
        # Worked out once, and without the lock: an access may have thousands of pieces.
        held_by = [(thread, flight) for thread, flight in flights if _touches(flight, area)]
        if not held_by:
            return True

        def drained() -> bool:
            return all(self._in_flight.get(thread) is not flight for thread, flight in held_by)

        with self._lock:
            self._waiting += 1
            try:
                return self._drained.wait_for(drained, timeout)
            finally:
                self._waiting -= 1

    def finish_conversion(self, state: PageState, runs: Sequence[Range] | None = None) -> None:
        """The conversion succeeded: its pages (or `runs` of them, in order) are in `state` now."""
        thread = threading.get_ident()
        conversion = self._conversions.get(thread)
        if conversion is None:
            return
        if runs is None and conversion.is_uniform:
            with self._lock:
                self._states.set(conversion.area, state)
                self._note_change()
                del self._conversions[thread]
            return
        whole = runs is None
        if runs is None:
            many = len(conversion.runs) > _RUNS_AT_ONCE
            runs = [run for run, _ in conversion.runs] if many else [conversion.area]
        parts = [runs[at : at + _RUNS_AT_ONCE] for at in range(0, len(runs), _RUNS_AT_ONCE)]
        for number, part in enumerate(parts, 1):
            start, end = part[0].start, part[-1].end
            last = number == len(parts)
            rest = None if last else conversion.advanced(end)
            with self._lock:
                for area in [Range(start, end - start)] if whole else part:
                    self._states.set(area, state)
                self._note_change()
                if rest is not None:
                    self._conversions[thread] = conversion = rest
                else:
                    del self._conversions[thread]
            if not last:
                time.sleep(0)  # else who waits for the lock may not get it for a long time
        if not parts:
            self.abandon_conversion()

    def _note_change(self) -> None:
        """Page states have changed; lock held."""
        self.changes += 1
        if self.on_change is not None:
            self.on_change()

    def abandon_conversion(self) -> None:
        """The conversion failed, or there was nothing to do: its pages are what they were."""
        with self._lock:
            self._conversions.pop(threading.get_ident(), None)

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
        for own in area.without(self.common):
            self.shared.punch(own.start, own.size)

    def residency(self) -> Residency:
        """What the kernel holds for either side right now."""
        private = 0 if self.private is None else self.private.resident_bytes()
        if not self.in_place:
            return Residency(private, self.shared.resident_bytes())
        runs = [run for run, state in self.states() if state is PageState.SHARED]
        shared = sum(self.shared.resident_bytes(run.start, run.size) for run in runs)
        return Residency(private - shared, shared)

    def other_side_bytes(self) -> int | None:
        """Bytes of host memory behind the sides that the pages' states say nobody uses.

        Where a guest reaches both sides of a page (scheme cbit) it can fill both. None where the
        host's kernel doesn't tell: cachestat(2) is of Linux 6.5, and not for hugetlbfs.
        """
        if self.private is None or self.in_place:
            return 0
        found = 0
        try:
            for run, state in self.states():
                if state is PageState.SHARED:
                    found += self.private.resident_bytes(run.start, run.size)
                elif state in (PageState.PRIVATE, PageState.LENT):
                    for own in run.without(self.common):  # of common pages there is one side
                        found += self.shared.resident_bytes(own.start, own.size)
        except OSError:
            return None
        return found

    def accounted(self) -> dict[str, int | None]:
        """`residency` for people and reports; None stands for what nobody knows: a container may
        refuse cachestat(2), and a run that ends well is not to fail for a figure."""
        try:
            return dict(self.residency()._asdict())
        except OSError:
            return dict.fromkeys(Residency._fields)

    def launched(self) -> None:
        """Everything is loaded, and the guest about to run."""

    def close(self) -> None:
        self.shared.close()
        if self.private is not None:
            self.private.close()


def _touches(flight: Flight, area: Range) -> bool:
    """Whether an access under way has a byte in `area`: between two of its pieces it has none."""
    start, end, pieces = flight
    low, high = area.start, area.end
    if not (start < high and low < end):
        return False
    if pieces is None:
        return True
    return any(
        gpa < high and low < gpa + size for gpa, size in zip(pieces[::2], pieces[1::2], strict=True)
    )


class MemoryThrough:
    """Guest memory as one device sees it: GuestMemory checks, an engine moves the bytes."""

    quiet = True
    """Nobody hears of an access that is refused: a device may try one whose use isn't certain."""

    def __init__(self, memory: GuestMemory, engine: Engine) -> None:
        self._memory = memory
        self._engine = engine
        self.pread, self.pwrite, self.discard = memory.pread, memory.pwrite, memory.discard
        self.read_many, self.write_many = memory.read_many, memory.write_many

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        """Move bytes of a file into guest memory: file offset, gpa, size, file offset...

        All of it is refused before a byte moves (GuestMemoryError), or the number of bytes is
        what was asked for, unless the file ends, or the engine stops because the host is slow.
        Raises OSError with some of it moved.
        """
        self._enter_moves(moves[1::3], moves[2::3])
        try:
            return self._engine.move_in(src_fd, moves)
        finally:
            self._memory._leave()

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        """Move guest memory into a file: gpa, file offset, size, gpa... As `move_in`."""
        self._enter_moves(moves[::3], moves[2::3])
        try:
            return self._engine.move_out(moves, dst_fd)
        finally:
            self._memory._leave()

    def _enter_moves(self, gpas: list[int], sizes: list[int]) -> None:
        if len(gpas) == 1:
            self._memory._enter(gpas[0], sizes[0])
            return
        pieces = [0] * (2 * len(gpas))
        pieces[::2], pieces[1::2] = gpas, sizes
        self._memory._enter_many(pieces)

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
            common = run.intersection(memory.common)
            pieces = [(own, memory.private) for own in run.without(memory.common)]
            pieces += [(common, memory.shared)] if common is not None else []
            runs += sorted(pieces, key=lambda piece: piece[0].start)
        self.written.append(area)
        return runs
