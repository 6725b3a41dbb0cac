"""A guest that shares every second page: nobody walks its runs with the lock held, what is asked
often is not walked at all, and there is an end to their number."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import Background, guest_memory, page, pages
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import PAGE_SIZE, Cut, Range, RangeMap
from vmm.memory import guest_memory as module
from vmm.memory.guest_memory import GuestMemory, PageState

SHARED, PRIVATE, DEFERRED = PageState.SHARED, PageState.PRIVATE, PageState.DEFERRED
PAGES = 8192
RAM = (Range(0, page(PAGES)),)


def convert(memory: GuestMemory, area: Range, state: PageState) -> None:
    memory.begin_conversion(area, state)
    memory.finish_conversion(state)


@pytest.fixture
def fragmented() -> Iterator[GuestMemory]:
    """Every second of 8192 pages is private."""
    with guest_memory(ram=RAM) as memory:
        for number in range(0, PAGES, 2):
            convert(memory, pages(number, 1), PRIVATE)
        assert len(memory._states) == PAGES
        yield memory


class Steps:
    """How many runs were looked at or changed each time that memory's lock was held."""

    def __init__(self, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = memory._lock
        self.holds: list[int] = []
        self.outside = 0
        monkeypatch.setattr(memory, "_lock", self)
        runs, move, of = RangeMap.runs, RangeMap._move, RangeMap.of

        def counting_runs(each: RangeMap[Any], within: Range | None = None) -> Iterator[Any]:
            for run in runs(each, within):
                self._count()
                yield run

        def counting_move(*arguments: Any) -> None:
            self._count()
            move(*arguments)

        def counting_of(cut: Cut[Any]) -> RangeMap[Any]:
            for _ in cut.starts:
                self._count()
            return of(cut)

        monkeypatch.setattr(RangeMap, "runs", counting_runs)
        monkeypatch.setattr(RangeMap, "_move", counting_move)
        monkeypatch.setattr(RangeMap, "of", staticmethod(counting_of))

    def _count(self) -> None:
        if self._lock.locked():
            self.holds[-1] += 1
        else:
            self.outside += 1

    def __enter__(self) -> None:
        self._lock.acquire()
        self.holds.append(0)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_bytes_in_a_state_walk_no_runs(
    fragmented: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(fragmented, monkeypatch)

    sizes = [fragmented.bytes_in(state) for state in PageState]

    assert sizes == [page(PAGES // 2), page(PAGES // 2), *[0] * (len(PageState) - 2)]
    assert [fragmented.most_bytes_in(state) for state in PageState] == sizes
    assert (sum(steps.holds), steps.outside) == (0, 0)


WALKS: dict[str, Callable[[GuestMemory], object]] = {
    "states": lambda memory: memory.states(),
    "states of a part": lambda memory: memory.states(pages(10, 4000)),
    "begin": lambda memory: memory.begin_conversion(RAM[0], SHARED),
    "discard": lambda memory: memory.discard(0, page(1000)),
}


@pytest.mark.parametrize("name", WALKS)
def test_walk_over_many_runs_holds_the_lock_for_no_step(
    fragmented: GuestMemory, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(fragmented, monkeypatch)

    WALKS[name](fragmented)

    assert steps.outside > 900
    assert max(steps.holds) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_conversion_of_many_runs_changes_them_in_parts(
    fragmented: GuestMemory, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fragmented.begin_conversion(RAM[0], DEFERRED)
    shared = None if whole else [run for run, state in before if state is SHARED]
    steps = Steps(fragmented, monkeypatch)

    fragmented.finish_conversion(DEFERRED, shared)

    assert max(steps.holds) <= module._RUNS_AT_ONCE + 1
    size = page(PAGES) if whole else page(PAGES // 2)
    assert fragmented.bytes_in(DEFERRED) == size
    assert fragmented.bytes_in(PageState.CONVERTING) == 0


def test_part_that_has_its_state_is_no_longer_converting_and_all_bytes_add_up(
    fragmented: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In between, who has waited for the lock sees each page in one state."""
    seen: list[tuple[int, bool]] = []

    def look(seconds: float) -> None:
        assert sum(fragmented.bytes_in(state) for state in PageState) == page(PAGES)
        converting = fragmented.bytes_in(PageState.CONVERTING)
        fragmented.pread(page(1), 0)
        with pytest.raises(PrivateAccess, match="converting"):
            fragmented.pread(1, page(PAGES - 1))
        seen.append((converting, fragmented.is_converting(pages(0, 1))))

    monkeypatch.setattr(time, "sleep", look)
    fragmented.begin_conversion(RAM[0], SHARED)

    fragmented.finish_conversion(SHARED)

    parts = PAGES // module._RUNS_AT_ONCE
    step = page(module._RUNS_AT_ONCE)
    assert seen == [(step * left, False) for left in range(parts - 1, 0, -1)]
    assert fragmented.states() == [(RAM[0], SHARED)]


# -- an end to them -------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuestMemory]:
    """64 pages in 15 runs: pages 0, 2, ... 12 and 14 to 63 are shared; 16 runs are the most."""
    monkeypatch.setattr(module, "MOST_RUNS", 16)
    with guest_memory() as memory:
        for number in range(1, 14, 2):
            convert(memory, pages(number, 1), PRIVATE)
        assert len(memory._states) == 15
        yield memory


def test_conversion_that_would_make_too_many_runs_is_refused_and_changes_nothing(
    full: GuestMemory,
) -> None:
    before = full.states()

    with pytest.raises(OSError, match=r"17 runs .* 16 are the most") as refused:
        full.begin_conversion(pages(30, 1), PRIVATE)

    assert refused.value.errno == errno.ENOSPC
    assert full.states() == before
    assert full.pread(1, page(30)) == b"\0"


@pytest.mark.parametrize(
    ("area", "state", "runs"),
    [
        (pages(14, 1), PRIVATE, 15),  # a boundary moves
        (pages(63, 1), PRIVATE, 16),  # the last run is split in two, not in three
        (pages(3, 1), SHARED, 13),
        (pages(3, 3), PRIVATE, 13),
        (pages(20, 1), SHARED, 15),
    ],
    ids=str,
)
def test_conversion_that_makes_none_too_many_goes_on_at_the_bound(
    full: GuestMemory, area: Range, state: PageState, runs: int
) -> None:
    convert(full, area, state)

    assert len(full._states) == runs
    assert full.states(area) == [(area, state)]


def test_guest_at_the_bound_can_always_give_its_runs_up(full: GuestMemory) -> None:
    convert(full, pages(63, 1), PRIVATE)

    convert(full, pages(0, 64), SHARED)

    assert full.states() == [(pages(0, 64), SHARED)]


# -- totals ---------------------------------------------------------------------------------------

STEP = st.tuples(
    st.integers(0, 63), st.integers(1, 64), st.sampled_from((SHARED, PRIVATE, DEFERRED)),
    st.sampled_from(("finish", "finish a part", "abandon", "leave under way")),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=12))
def test_totals_are_what_adding_up_gives(steps: list[tuple[int, int, PageState, str]]) -> None:
    with guest_memory(pages(20, 30)) as memory:
        for number, (first, count, state, end) in enumerate(steps):
            area = pages(first, min(count, 64 - first))
            if memory.is_converting(area):
                continue
            before = memory.begin_conversion(area, state)
            if end == "abandon":
                memory.abandon_conversion()
            elif end == "leave under way":  # as if on another thread
                (thread,) = [key for key in memory._conversions if key >= 0]
                memory._conversions[-1 - number] = memory._conversions.pop(thread)
            else:
                runs = [run for run, _ in before[: len(before) // 2]]
                memory.finish_conversion(state, None if end == "finish" else runs)

            states = memory.states()
            for each in PageState:
                added = sum(run.size for run, held in states if held is each)
                assert memory.bytes_in(each) == added
            coming = {each.target for each in memory._conversions.values()}
            stored = {run[1] for run in memory._states.runs()}
            for each in (SHARED, PRIVATE, DEFERRED):
                least, most = memory.bytes_in(each), memory.most_bytes_in(each)
                assert least <= most <= page(64)
                assert most == least or each in coming | stored


def test_bytes_that_may_be_in_a_state_count_pages_on_their_way_twice() -> None:
    with guest_memory(pages(32, 32)) as memory:
        memory.begin_conversion(pages(24, 16), SHARED)

        assert memory.bytes_in(SHARED) == page(24)
        assert memory.bytes_in(PRIVATE) == page(24)
        assert memory.bytes_in(PageState.CONVERTING) == page(16)
        assert memory.most_bytes_in(SHARED) == page(32 + 8)
        assert memory.most_bytes_in(PRIVATE) == page(32)
        assert memory.most_bytes_in(DEFERRED) == 0


# -- side by side ---------------------------------------------------------------------------------


def test_conversions_by_several_threads_go_side_by_side() -> None:
    with guest_memory(pages(32, 32)) as memory:
        memory.begin_conversion(pages(4, 2), PRIVATE)
        Background(lambda: memory.begin_conversion(pages(8, 2), PRIVATE)).result()

        assert memory.states(pages(0, 12)) == [
            (pages(0, 4), SHARED), (pages(4, 2), PageState.CONVERTING), (pages(6, 2), SHARED),
            (pages(8, 2), PageState.CONVERTING), (pages(10, 2), SHARED),
        ]  # fmt: skip
        with pytest.raises(PrivateAccess, match=r"\[0x4000, 0x5000\) is converting"):
            memory.pread(5 * PAGE_SIZE, 0)
        with pytest.raises(RuntimeError, match="being converted already"):
            Background(lambda: memory.begin_conversion(pages(5, 1), SHARED)).result()
        memory.finish_conversion(PRIVATE)
        assert memory.is_converting(pages(9, 1))
        assert memory.bytes_in(PRIVATE) == page(34)
