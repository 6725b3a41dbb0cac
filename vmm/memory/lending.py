"""Guest memory that a guest lends to its devices, page by page, through a virtual IOMMU.

A device behind the IOMMU names *IO virtual addresses* (IOVA). `AddressSpace` says which
guest-physical pages they are, `IommuMemory` is what the device has in the place of guest memory:
it translates, refuses what the guest has not mapped, and moves the bytes. A private page that is
mapped is `PageState.LENT`: to everybody but that device it stays as private as it was.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple

from vmm.core.errors import GuestMemoryError, PrivateAccess, UnmappedAccess
from vmm.core.ranges import NOWHERE, Range, RangeMap
from vmm.memory.backing import Backing, Buffer, byte_count
from vmm.memory.guest_memory import MOST_RUNS, GuestMemory, PageState

if TYPE_CHECKING:
    from vmm.memory.engines import Engine

READ, WRITE = 1, 2  # VIRTIO_IOMMU_MAP_F_READ, _WRITE (virtio 1.3, 5.13.6.5)

MOST_MAPPINGS = 1 << 15
"""How many mappings a guest may have in all its address spaces together. A pool of 64 MiB that is
mapped page by page has 16,384."""

_NO_WINDOW = 0, 0, 0

_RUNS_AT_ONCE = 512
"""How many runs of pages change their state with memory's lock held."""

PRIVATE = frozenset({PageState.PRIVATE, PageState.LENT})
"""The states of pages that are the guest's alone, or lent by it."""


class IommuFault(GuestMemoryError):
    """A device named an address that its guest has not mapped for it, or not in this direction."""


class Mapping(NamedTuple):
    """`size` bytes at `iova` are those at `gpa`, for accesses in `access` (READ, WRITE or both).

    `lent`: the pages are private ones; else they were shared when they were mapped, and have to
    be whenever the device touches them. `since`: when it was made, on its maker's clock.
    """

    iova: int
    size: int
    gpa: int
    access: int
    lent: bool
    since: int = 0

    @property
    def area(self) -> Range:
        """The guest-physical range."""
        return Range(self.gpa, self.size)


class AddressSpace:
    """The mappings of one device, by IOVA; none overlaps another.

    LendingMemory's lock serialises changes and lookups.
    """

    __slots__ = ("mappings", "starts", "windows")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.mappings: list[Mapping] = []
        self.windows: list[tuple[int, int, int]] = [_NO_WINDOW]
        """What most translations need of each mapping: its end, what makes a GPA of an IOVA, and
        the access that it allows where its pages are the private backing's, else 0. One more than
        there are mappings, for index -1."""

    def __len__(self) -> int:
        return len(self.starts)

    def within(self, first: int, last: int) -> tuple[int, int]:
        """The mappings [low, high) that have an address in [first, last]."""
        low = bisect_right(self.starts, first)
        if low and first < self.starts[low - 1] + self.mappings[low - 1].size:
            low -= 1
        return low, bisect_right(self.starts, last, low)

    def is_split_by(self, first: int, last: int, low: int, high: int) -> bool:
        """Whether one of the mappings [low, high), which are those within [first, last], has
        addresses outside of it."""
        if low == high:
            return False
        end = self.mappings[high - 1]
        return self.starts[low] < first or end.iova + end.size - 1 > last

    def add(self, at: int, mapping: Mapping, common: Range) -> None:
        """Put the mapping in front of the one that is number `at` so far."""
        iova, size, gpa, access, lent, _ = mapping
        own = lent and (gpa >= common.end or gpa + size <= common.start)
        window = iova + size, gpa - iova, access if own else 0
        self.starts.insert(at, iova)
        self.mappings.insert(at, mapping)
        self.windows.insert(at, window)

    def remove(self, low: int, high: int) -> list[Mapping]:
        """Take the mappings [low, high) out."""
        taken = self.mappings[low:high]
        del self.starts[low:high], self.mappings[low:high], self.windows[low:high]
        return taken


class Endpoint:
    """A device behind the IOMMU: by its name, and by its number in the guest's requests.

    `space` is None while the guest has not attached it to a domain.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.space: AddressSpace | None = None
        self.fault: Callable[[Endpoint, int, int], None] = lambda endpoint, iova, access: None
        """Told of an access (the address, READ or WRITE) that was refused; from any thread."""


def can_lend(backing: Backing) -> bool:
    """Whether a device can be let at private pages there: the host has to reach them, and in place
    it is KVM that refuses."""
    return backing.access != "none" and not backing.traits.in_place


class LendingMemory(GuestMemory):
    """GuestMemory whose private pages can be lent.

    A page is LENT as long as mappings of it exist, of which there may be several: Linux maps two
    buffers in one page twice. It can't be converted or discarded meanwhile. Whoever maps and
    unmaps does so one at a time, and is the only one to.
    """

    def __init__(
        self,
        ram: Sequence[Range],
        shared: Backing,
        private_backing: Backing | None = None,
        private: Sequence[Range] = (),
        common: Range = NOWHERE,
    ) -> None:
        super().__init__(ram, shared, private_backing, private, common)
        # How many mappings each page is lent by beyond the first: for nearly all that is none.
        # Only the thread that maps touches it: no lock.
        self._again = RangeMap(Range(0, self._end), 0)
        self.mapped = 0
        """How many mappings there are."""

    @property
    def lends(self) -> bool:
        """Whether private pages can be lent."""
        return self.private is not None and can_lend(self.private)

    @property
    def lent_bytes(self) -> int:
        return self._states.total(PageState.LENT)

    @property
    def runs(self) -> int:
        """How many runs of pages in equal state there are."""
        return len(self._states)

    # -- mappings -----------------------------------------------------------------------------

    def kind_of(self, area: Range) -> set[PageState | None]:
        """The states that pages of `area` are in; None stands for what is no RAM."""
        with self._lock:
            return self._kind_of(area)

    def _kind_of(self, area: Range) -> set[PageState | None]:
        if not self.is_ram(area):
            return {None}
        if self._conversions and self._converting_in(area) is not None:
            return {PageState.CONVERTING}
        return self._states.values(area)

    def map(self, space: AddressSpace, iova: int, area: Range, access: int, since: int) -> Mapping:
        """Let the device of `space` have `area` (whole pages) at `iova`.

        Raises OSError. EINVAL: something is mapped already, or some of the pages are shared and
        some not. EFAULT: it is no RAM, or private and can't be lent. EAGAIN: a page is being
        converted or deferred. ENOSPC: too many mappings, or runs of pages in equal state.
        """
        start, size = area
        end = start + size
        again: list[Range] = []
        with self._lock:
            at, high = space.within(iova, iova + size - 1)
            if at != high:
                raise OSError(errno.EINVAL, f"something is mapped at {iova:#x} already")
            if self.mapped >= MOST_MAPPINGS:
                raise OSError(errno.ENOSPC, f"{MOST_MAPPINGS} mappings are the most")
            states = self._states
            lent = False
            # Nearly always all of it is private, and nothing is being converted.
            state = states.uniform(start, end) if start >= 0 and end <= self._end else None
            if state is PageState.PRIVATE and not self._conversions and self.lends:
                lent = True
                if len(states) > MOST_RUNS - 2:
                    self._require_room(area, PageState.LENT)
                states.set(area, PageState.LENT)
            else:
                kinds = self._kind_of(area)
                if kinds <= PRIVATE:
                    lent = True
                    again = self._lend_again(area)
                elif kinds != {PageState.SHARED}:
                    raise OSError(_why_not(kinds), f"{area} can't be mapped: {kinds}")
            mapping = Mapping(iova, size, start, access, lent, since)
            space.add(at, mapping, self.common)
            self.mapped += 1
        for run in again:
            for part, count in list(self._again.runs(run)):
                self._again.set(part, count + 1)
        return mapping

    def _lend_again(self, area: Range) -> list[Range]:
        """Make private and lent pages lent ones; those that were so already. With the lock held.
        Raises OSError."""
        if not self.lends:
            raise OSError(errno.EFAULT, f"{area} is private, and its backing can't lend")
        self._require_room(area, PageState.LENT)
        already = [run for run, state in self._states.runs(area) if state is PageState.LENT]
        self._states.set(area, PageState.LENT)
        self._note_change()
        return already

    def unmap(self, space: AddressSpace, low: int, high: int) -> list[Mapping]:
        """Take the mappings [low, high) out of the space: no access by them begins any more.

        Those under way are the caller's to wait for (`quiesce`), before it gives the pages back.
        """
        with self._lock:
            taken = space.remove(low, high)
            self.mapped -= len(taken)
        return taken

    def put_back(self, space: AddressSpace, mappings: Sequence[Mapping]) -> None:
        """Undo `unmap`: the pages are lent still."""
        with self._lock:
            for mapping in mappings:
                space.add(bisect_left(space.starts, mapping.iova), mapping, self.common)
            self.mapped += len(mappings)

    def drained(self, mappings: Sequence[Mapping], timeout: float) -> bool:
        """`quiesce` for the pages of mappings, one after the other."""
        if not self._in_flight:
            return True
        return all(self.quiesce(mapping.area, timeout) for mapping in mappings)

    def take_back(self, mapping: Mapping) -> list[Range]:
        """The pages of a mapping that was taken out are lent once less; those that are private
        again, in ranges."""
        if not mapping.lent:
            return []
        area = mapping.area
        again = self._again
        if again.is_uniform(area.start, area.end, 0):
            with self._lock:
                self._states.set(area, PageState.PRIVATE)
                self._note_change()
            return [area]
        freed: list[Range] = []
        for run, count in list(again.runs(area)):
            if count:
                again.set(run, count - 1)
            else:
                freed.append(run)
        for at in range(0, len(freed), _RUNS_AT_ONCE):
            with self._lock:
                for run in freed[at : at + _RUNS_AT_ONCE]:
                    self._states.set(run, PageState.PRIVATE)
                self._note_change()
        return freed

    # -- what GuestMemory does, of lent pages ---------------------------------------------------

    def begin_conversion(
        self, area: Range, target: PageState | None = None
    ) -> list[tuple[Range, PageState]]:
        """As GuestMemory's. Raises OSError (EBUSY) for lent pages: the guest has to unmap first."""
        before = super().begin_conversion(area, target)
        # From here on nobody lends them: what isn't lent now won't be.
        if self.lent_bytes and any(state is PageState.LENT for _, state in before):
            self.abandon_conversion()
            raise OSError(errno.EBUSY, f"a part of {area} is lent to a device")
        return before

    def discard(self, gpa: int, size: int) -> None:
        """As GuestMemory's. Raises PrivateAccess for lent pages."""
        if self.lent_bytes and size > 0 and PageState.LENT in self.kind_of(Range(gpa, size)):
            raise PrivateAccess(f"discard of {size:#x} bytes at {gpa:#x}: lent to a device")
        super().discard(gpa, size)


def _why_not(states: set[PageState | None]) -> int:
    """The errno for pages that can't be mapped."""
    if None in states:
        return errno.EFAULT
    if states & {PageState.CONVERTING, PageState.DEFERRED}:
        return errno.EAGAIN
    return errno.EINVAL


class _Plan(NamedTuple):
    """An access under way: its pieces (gpa, size, gpa, size...), and the side each of them is on
    (True: private); `uniform` is that of all, None where they differ."""

    pieces: list[int]
    sides: list[bool]
    uniform: bool | None


class IommuMemory:
    """Guest memory as the device of `endpoint` sees it: by IOVA, and only what is mapped for it.

    The verbs of MemoryThrough. An access is refused as a whole (GuestMemoryError) before a byte
    moves; one that spans mappings is moved piece by piece. `engines` move the bytes of files, to
    and from the shared and the private side (None: the backings themselves do).
    """

    def __init__(
        self,
        memory: LendingMemory,
        endpoint: Endpoint,
        engines: tuple[Engine, Engine | None] | None = None,
    ) -> None:
        self._memory = memory
        self._endpoint = endpoint
        self._engines = engines
        if engines is not None:  # a device without has no use for them, and asks for them by name
            self.move_in, self.move_out = self._move_in, self._move_out

    # -- translation --------------------------------------------------------------------------

    def _begin(self, pieces: Sequence[int], access: int) -> _Plan:
        """Translate all pieces (IOVA, size, IOVA, size...), and hold off unmaps and conversions
        of what they are until `_leave`. Raises IommuFault, GuestMemoryError."""
        memory, endpoint = self._memory, self._endpoint
        sides: list[bool] = []
        with memory._lock:
            space = endpoint.space
            refused = None
            found: list[int] = []
            if space is None:
                refused = pieces[0] if pieces else 0
            else:
                windows = _in_windows(space, pieces, access)
                if windows is not None:
                    found, sides = windows, [True] * (len(windows) // 2)
                else:
                    refused = self._translate(space, pieces, access, found, sides)
            if refused is None:
                gpas = found[::2]
                start, end = 0, 0
                if len(found) == 2:
                    start, end = gpas[0], gpas[0] + found[1]
                elif found:
                    start, end = min(gpas), max(gpas) + max(found[1::2])
                several = found if len(found) > 2 else None
                memory._in_flight[get_ident()] = (start, end, several)
        if refused is not None:
            raise self._fault(refused, access)
        uniform = sides[0] if sides else False
        if (not uniform) in sides:
            return _Plan(found, sides, None)
        return _Plan(found, sides, uniform)

    def _translate(
        self,
        space: AddressSpace,
        pieces: Sequence[int],
        access: int,
        found: list[int],
        sides: list[bool],
    ) -> int | None:
        """Fill `found` and `sides`; the first address that is refused, None if none is. With
        memory's lock held."""
        memory = self._memory
        starts, mappings = space.starts, space.mappings
        common_start, common_end = memory.common.start, memory.common.end
        for iova, size in zip(pieces[::2], pieces[1::2], strict=True):
            at, left = iova, size
            if size < 0:
                return iova
            while left:
                index = bisect_right(starts, at) - 1
                if index < 0:
                    return at
                start, length, gpa, allowed, lent, _ = mappings[index]
                offset = at - start
                part = min(length - offset, left)
                if part <= 0 or not allowed & access:
                    return at
                gpa += offset
                if not lent:
                    if not memory._is_shared(gpa, gpa + part):
                        return at
                elif gpa < common_end:  # one memory at both aliases, in the shared backing
                    lent = gpa < common_start
                    part = min(part, (common_start if lent else common_end) - gpa)
                found += (gpa, part)
                sides.append(lent)
                at += part
                left -= part
        return None

    def _fault(self, iova: int, access: int) -> GuestMemoryError:
        endpoint = self._endpoint
        endpoint.fault(endpoint, iova, access)
        verb = "write to" if access == WRITE else "read of"
        if endpoint.space is None:
            return IommuFault(f"{verb} {iova:#x} by {endpoint.name}, which is in no domain")
        return IommuFault(f"{verb} {iova:#x} by {endpoint.name}: not mapped for that")

    def pieces_of(self, iova: int, size: int) -> list[Range]:
        """The guest-physical ranges that an access would reach, as far as they are mapped."""
        found: list[int] = []
        with self._memory._lock:
            space = self._endpoint.space
            if space is not None:
                self._translate(space, (iova, size), READ | WRITE, found, [])
        return [Range(*piece) for piece in zip(found[::2], found[1::2], strict=True)]

    def _side(self, private: bool) -> Backing:
        memory = self._memory
        if not private:
            return memory.shared
        assert memory.private is not None  # else nothing is lent
        return memory.private

    # -- the verbs ----------------------------------------------------------------------------

    def _begin_one(self, iova: int, size: int, access: int) -> int | None:
        """`_begin` for what lies in one mapping of private pages: where; None for all else, which
        is not begun then."""
        memory = self._memory
        with memory._lock:
            space = self._endpoint.space
            if space is not None:
                end, distance, allowed = space.windows[bisect_right(space.starts, iova) - 1]
                if allowed & access and 0 < size <= end - iova:
                    gpa = iova + distance
                    memory._in_flight[get_ident()] = (gpa, gpa + size, None)
                    return gpa
        return None

    def pread(self, size: int, gpa: int) -> bytes:
        """`size` bytes at the IOVA `gpa`."""
        where = self._begin_one(gpa, size, READ)
        if where is not None:
            try:
                return self._memory.private.pread(size, where)  # type: ignore[union-attr]  # it lends
            finally:
                self._memory._leave()
        plan = self._begin((gpa, size), READ)
        try:
            if len(plan.sides) == 1:
                return self._side(plan.sides[0]).pread(size, plan.pieces[0])
            return bytes(self._read(plan))
        finally:
            self._memory._leave()

    def pwrite(self, data: Buffer, gpa: int) -> None:
        """Write `data` at the IOVA `gpa`."""
        size = byte_count(data)
        where = self._begin_one(gpa, size, WRITE)
        if where is not None:
            try:
                self._memory.private.pwrite(data, where)  # type: ignore[union-attr]  # it lends
            finally:
                self._memory._leave()
            return
        plan = self._begin((gpa, size), WRITE)
        try:
            if len(plan.sides) == 1:
                self._side(plan.sides[0]).pwrite(data, plan.pieces[0])
            else:
                self._write(plan, bytes(data))
        finally:
            self._memory._leave()

    def read_many(self, pieces: list[int]) -> bytes | bytearray:
        """The bytes of all pieces (IOVA, size, IOVA, size...), one after the other."""
        plan = self._begin(pieces, READ)
        try:
            return self._read(plan)
        finally:
            self._memory._leave()

    def write_many(self, pieces: list[int], data: bytes) -> None:
        """Write `data` over the pieces (IOVA, size, IOVA, size...), in their order."""
        plan = self._begin(pieces, WRITE)
        try:
            self._write(plan, data)
        finally:
            self._memory._leave()

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        """Move bytes of a file to the IOVA `gpa`; short only at the file's end."""
        plan = self._begin((gpa, size), WRITE)
        try:
            done = 0
            for at, length, private in _triples(plan):
                mover = self._mover(private)
                moved = mover.transfer_in(src_fd, src_offset + done, at, length)
                done += moved
                if moved < length:
                    break
            return done
        finally:
            self._memory._leave()

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        """Move bytes at the IOVA `gpa` into a file; how many."""
        plan = self._begin((gpa, size), READ)
        try:
            done = 0
            for at, length, private in _triples(plan):
                mover = self._mover(private)
                done += mover.transfer_out(at, length, dst_fd, dst_offset + done)
            return done
        finally:
            self._memory._leave()

    def discard(self, gpa: int, size: int) -> None:
        """Refused: no device that gives pages back is behind the IOMMU."""
        raise UnmappedAccess(f"discard of {size:#x} bytes at {gpa:#x} by {self._endpoint.name}")

    def _move_in(self, src_fd: int, moves: list[int]) -> int:
        """As MemoryThrough's `move_in`: file offset, IOVA, size, file offset..."""
        pieces = [0] * (len(moves) // 3 * 2)
        pieces[::2], pieces[1::2] = moves[1::3], moves[2::3]
        plan = self._begin(pieces, WRITE)
        try:
            return sum(
                self._engine(private).move_in(src_fd, _interleaved(offsets, gpas, sizes))
                for private, offsets, gpas, sizes in _by_side(plan, moves[::3], moves[2::3])
            )
        finally:
            self._memory._leave()

    def _move_out(self, moves: list[int], dst_fd: int) -> int:
        """As MemoryThrough's `move_out`: IOVA, file offset, size, IOVA..."""
        pieces = [0] * (len(moves) // 3 * 2)
        pieces[::2], pieces[1::2] = moves[::3], moves[2::3]
        plan = self._begin(pieces, READ)
        try:
            return sum(
                self._engine(private).move_out(_interleaved(gpas, offsets, sizes), dst_fd)
                for private, offsets, gpas, sizes in _by_side(plan, moves[1::3], moves[2::3])
            )
        finally:
            self._memory._leave()

    # -- sides --------------------------------------------------------------------------------

    def _engine(self, private: bool) -> Engine:
        assert self._engines is not None
        engine = self._engines[private]
        assert engine is not None
        return engine

    def _mover(self, private: bool) -> Backing | Engine:
        return self._side(private) if self._engines is None else self._engine(private)

    def _read(self, plan: _Plan) -> bytes | bytearray:
        if not plan.pieces:
            return b""
        if plan.uniform is not None:
            return self._side(plan.uniform).read_many(plan.pieces)
        return b"".join(self._side(private).pread(size, at) for at, size, private in _triples(plan))

    def _write(self, plan: _Plan, data: bytes) -> None:
        if not plan.pieces:
            return
        if plan.uniform is not None:
            self._side(plan.uniform).write_many(plan.pieces, data)
            return
        done = 0
        for at, size, private in _triples(plan):
            self._side(private).pwrite(data[done : done + size], at)
            done += size


def _in_windows(space: AddressSpace, pieces: Sequence[int], access: int) -> list[int] | None:
    """The pieces by GPA where each is in one mapping of the private backing's pages; else None."""
    starts, windows = space.starts, space.windows
    found: list[int] = []
    for iova, size in zip(pieces[::2], pieces[1::2], strict=True):
        end, distance, allowed = windows[bisect_right(starts, iova) - 1]
        if not allowed & access or not 0 < size <= end - iova:
            return None
        found += (iova + distance, size)
    return found


def _triples(plan: _Plan) -> Iterator[tuple[int, int, bool]]:
    """(gpa, size, private) of each piece."""
    return zip(plan.pieces[::2], plan.pieces[1::2], plan.sides, strict=True)


def _interleaved(first: list[int], second: list[int], sizes: list[int]) -> list[int]:
    moves = [0] * (3 * len(sizes))
    moves[::3], moves[1::3], moves[2::3] = first, second, sizes
    return moves


def _by_side(
    plan: _Plan, offsets: list[int], sizes: list[int]
) -> list[tuple[bool, list[int], list[int], list[int]]]:
    """For each side that a plan has pieces on: their file offsets, gpas, sizes.

    `offsets` and `sizes` are those of the moves, each of which became one piece or several.
    """
    if plan.uniform is not None and len(plan.sides) == len(sizes):
        return [(plan.uniform, offsets, plan.pieces[::2], plan.pieces[1::2])]
    made: dict[bool, tuple[list[int], list[int], list[int]]] = {}
    pieces = _triples(plan)
    for offset, size in zip(offsets, sizes, strict=True):
        done = 0
        while done < size:
            gpa, part, private = next(pieces)
            columns = made.setdefault(private, ([], [], []))
            for column, value in zip(columns, (offset + done, gpa, part), strict=True):
                column.append(value)
            done += part
    return [(private, *columns) for private, columns in made.items()]
