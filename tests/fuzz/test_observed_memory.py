"""Random accesses to memory whose guest shares and takes back pages, beside a reference."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import pattern
from tests.support.protected import ProtectedGuest, protected_memory
from vmm.core.errors import GuestMemoryError, PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.engines import make_engine
from vmm.memory.observed_memory import ObservedMemory

PAGES = 8
SIZE = PAGES * PAGE_SIZE
FILE = 1 << 18

Pieces = list[tuple[int, int]]

# Most lie near the boundaries of pages, where what can go wrong goes wrong.
_near = st.builds(
    lambda page, off: page * PAGE_SIZE + off,
    st.integers(-1, PAGES + 1),
    st.one_of(st.integers(-3, 3), st.integers(0, PAGE_SIZE)),
)
_sizes = st.one_of(st.integers(0, 40), st.integers(PAGE_SIZE - 3, 3 * PAGE_SIZE + 3))
_changes = st.tuples(st.sampled_from(["share", "unshare"]), st.integers(0, PAGES - 1))
_accesses = st.tuples(
    st.sampled_from(["read", "write", "in auto", "in pread", "out auto", "out pread"]),
    st.lists(st.tuples(_near, _sizes), min_size=1, max_size=6),
)


class World:
    """Observed memory, its guest and a disk; what all of them should hold."""

    def __init__(self, memory: ObservedMemory, guest: ProtectedGuest, fd: int) -> None:
        self.memory, self._guest, self._fd = memory, guest, fd
        self._bytes = bytearray(pattern(SIZE))
        self._file = bytearray(pattern(FILE, 7))
        self.private = {0, 3, 4}
        guest.poke(bytes(self._bytes), 0)
        os.pwrite(fd, self._file, 0)

    def change(self, verb: str, page: int) -> None:
        area = Range(page * PAGE_SIZE, PAGE_SIZE)
        if verb == "share":
            self._guest.share(area)
            self.private.discard(page)
        else:
            self._guest.unshare(area)
            self.private.add(page)

    def access(self, verb: str, pieces: Pieces) -> None:
        """Carry it out, and compare everything afterwards."""
        placed = _placed(pieces)
        data = pattern(sum(size for _, size in pieces), len(pieces))
        verdict: type[GuestMemoryError] | None = None
        found: bytes | bytearray | int | None = None
        try:
            found = self._calls(verb, placed, data)()
        except GuestMemoryError as error:
            verdict = type(error)
        assert verdict is self._verdict(pieces)
        if verdict is None:
            if verb == "read":
                assert found == b"".join([self._bytes[gpa : gpa + size] for gpa, size in pieces])
            self._carry_out(verb, placed, data)
        elif verdict is PrivateAccess:
            self._adopt_what_was_moved(verb, placed)
        assert self._guest.peek(SIZE, 0) == self._bytes
        assert os.pread(self._fd, FILE, 0) == self._file

    def _calls(
        self, verb: str, placed: list[tuple[int, int, int]], data: bytes
    ) -> Callable[[], bytes | bytearray | int | None]:
        flat = [number for gpa, _, size in placed for number in (gpa, size)]
        if verb == "read":
            return lambda: self.memory.read_many(flat)
        if verb == "write":
            return lambda: self.memory.write_many(flat, data)
        direction, name = verb.split()
        seen = self.memory.through(make_engine(name, self.memory.shared))
        if direction == "in":
            moves = [number for gpa, at, size in placed for number in (at, gpa, size)]
            return lambda: seen.move_in(self._fd, moves)
        return lambda: seen.move_out([n for each in placed for n in each], self._fd)

    def _verdict(self, pieces: Pieces) -> type[GuestMemoryError] | None:
        if any(gpa < 0 or gpa + max(size, 1) > SIZE for gpa, size in pieces):
            return UnmappedAccess
        touched = {
            page
            for gpa, size in pieces
            if size
            for page in range(gpa // PAGE_SIZE, (gpa + size - 1) // PAGE_SIZE + 1)
        }
        return PrivateAccess if touched & self.private else None

    def _carry_out(self, verb: str, placed: list[tuple[int, int, int]], data: bytes) -> None:
        for gpa, at, size in placed:
            if verb == "write":
                self._bytes[gpa : gpa + size] = data[at : at + size]
            elif verb.startswith("in"):
                self._bytes[gpa : gpa + size] = self._file[at : at + size]
            elif verb.startswith("out"):
                self._file[at : at + size] = self._bytes[gpa : gpa + size]

    def _adopt_what_was_moved(self, verb: str, placed: list[tuple[int, int, int]]) -> None:
        """What lies before the first private page may have been moved, and nothing else."""
        if verb == "read":
            return
        for gpa, at, size in placed:
            pages = range(gpa // PAGE_SIZE, -(-(gpa + size) // PAGE_SIZE))
            kept = [page * PAGE_SIZE for page in pages if page in self.private]
            before = min(kept[0] - gpa, size) if kept and kept[0] > gpa else 0 if kept else size
            if verb.startswith("out"):
                self._file[at : at + before] = os.pread(self._fd, before, at)
            else:
                self._bytes[gpa : gpa + before] = self._guest.peek(before, gpa)
            if kept and size:
                return


def _placed(pieces: Pieces) -> list[tuple[int, int, int]]:
    """(gpa, place in the file or buffer, size), one place after the other."""
    placed, at = [], 0
    for gpa, size in pieces:
        placed.append((gpa, at, size))
        at += size
    return placed


@settings(max_examples=100 * int(os.environ.get("PYVMM_FUZZ", "1")), deadline=None)
@given(st.lists(st.one_of(_changes, _accesses), max_size=12))
def test_random_accesses_move_what_is_shared_and_never_a_private_byte(
    steps: list[tuple[str, int] | tuple[str, Pieces]],
) -> None:
    kept = [Range(page * PAGE_SIZE, PAGE_SIZE) for page in (0, 3, 4)]
    with (
        os.fdopen(os.memfd_create("disk"), "rb") as disk,
        protected_memory(*kept, ram=(Range(0, SIZE),)) as (memory, guest),
    ):
        world = World(memory, guest, disk.fileno())
        for verb, argument in steps:
            if isinstance(argument, int):
                world.change(verb, argument)
            else:
                world.access(verb, argument)
        reached = [page not in world.private for page in range(PAGES)]
        assert memory.probe([page * PAGE_SIZE for page in range(PAGES)]) == reached
