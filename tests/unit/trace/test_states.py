"""Page states over time, against a model that looks at every page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.trace import MILLISECOND, PAGE, Events
from vmm.trace.arrays import np
from vmm.trace.reader import Trace
from vmm.trace.states import (
    DEFERRED,
    PRIVATE,
    SHARED,
    STATES,
    BytesOverTime,
    StateRows,
    bytes_over_time,
    initial_states,
    state_rows,
)
from vmm.trace.views.charts import points, rectangles

RAM = 48
changes = st.lists(
    st.tuples(
        st.integers(0, RAM - 1), st.integers(1, RAM), st.sampled_from(STATES[1:]),
        st.integers(0, 3),
    ),
    max_size=30,
)  # fmt: skip


INITIAL = [(0, 8 * PAGE, SHARED), (8 * PAGE, (RAM - 8) * PAGE, PRIVATE)]
History = list[list[str]]


def changed(what: list[tuple[int, int, str, int]]) -> tuple[StateRows, History]:
    """Rows for changes (first page, pages, state, ms that it took), one every 10 ms, and the
    state of every page after each of them."""
    pages = ["shared"] * 8 + ["private"] * (RAM - 8)
    history, rows = [list(pages)], []
    for number, (first, wanted, state, took) in enumerate(what):
        count, end = min(wanted, RAM - first), 10 * (number + 1) * MILLISECOND
        began = end - took * MILLISECOND
        rows.append((began, end, first * PAGE, count * PAGE, STATES.index(state)))
        pages[first : first + count] = [state] * count
        history.append(list(pages))
    columns = np.array(rows, np.uint64).reshape(len(rows), 5).T
    return StateRows(*columns), history


@given(changes)
def test_bytes_over_time_are_those_of_the_pages(what: list[tuple[int, int, str, int]]) -> None:
    rows, history = changed(what)

    found = bytes_over_time(rows, INITIAL)

    assert found.end.tolist() == [10 * n * MILLISECOND for n in range(len(history))]
    for number, values in ((SHARED, found.shared), (DEFERRED, found.deferred)):
        assert values.tolist() == [PAGE * states.count(STATES[number]) for states in history]


def over_time_of(trace: Trace) -> BytesOverTime:
    return bytes_over_time(state_rows(trace), initial_states(trace))


def painted(found: Any, steps: int) -> list[list[str | None]]:
    """Each page's state in the middle of each 10 ms, taken from the rectangles."""
    picture: list[list[str | None]] = [[None] * RAM for _ in range(steps)]
    scale = found.block_bytes // PAGE
    columns = (found.start, found.end, found.first, found.blocks, found.state)
    for start, end, first, blocks, state in zip(*(c.tolist() for c in columns), strict=True):
        for step in range(steps):
            if start <= (10 * step + 5) * MILLISECOND < end:
                for page in range(first * scale, (first + blocks) * scale):
                    if page < RAM:
                        assert picture[step][page] is None, "rectangles overlap"
                        picture[step][page] = STATES[state]
    return picture


@given(changes)
def test_rectangles_paint_every_page_at_every_time(what: list[tuple[int, int, str, int]]) -> None:
    rows, history = changed(what)

    found = rectangles(rows, INITIAL, 10 * len(history) * MILLISECOND)

    assert found.block_bytes == PAGE
    assert painted(found, len(history)) == history


def test_rectangles_too_many_are_drawn_more_coarsely() -> None:
    what = [(page, 1, "shared", 0) for page in range(8, RAM, 2)] * 3
    rows, history = changed(what)

    found = rectangles(rows, INITIAL, 10 * len(history) * MILLISECOND, most=8)

    assert len(found.start) <= 8
    assert found.block_bytes > PAGE
    assert painted(found, len(history))[-1][:8] == ["shared"] * 8


@pytest.mark.parametrize(("gib", "block"), [(16, PAGE), (17, 2 * PAGE), (512, 32 * PAGE)])
def test_blocks_are_as_many_as_there_is_memory_for_however_few_changes_there_are(
    gib: int, block: int
) -> None:
    rows, _ = changed([(0, 1, "shared", 0)])

    found = rectangles(rows, [(0, gib << 30, INITIAL[0][2])], MILLISECOND)

    assert found.block_bytes == block


def test_change_while_another_is_slow_counts_when_it_is_done(tmp_path: Path) -> None:
    events = Events((0, 4, "private"))
    events.state(5.0, 2, 1, "shared", took=1.0)  # done at 6 ms, written first
    events.state(1.0, 0, 1, "shared", took=9.0)  # done at 10 ms

    found = over_time_of(Trace(events.write(tmp_path)))

    assert [at // MILLISECOND for at in found.end.tolist()] == [0, 6, 10]
    assert found.shared.tolist() == [0, PAGE, 2 * PAGE]


def test_change_outside_the_recorded_ram_is_ignored(tmp_path: Path) -> None:
    events = Events((0, 4, "private"))
    events.state(1.0, 3, 1 << 40, "shared")
    events.state(2.0, 1 << 50, 1, "shared")

    trace = Trace(events.write(tmp_path))

    assert over_time_of(trace).shared.tolist() == [0, PAGE, PAGE]
    drawn = rectangles(state_rows(trace), initial_states(trace), 3 * MILLISECOND)
    assert drawn.first.tolist() == [3, 0, 3]


def test_mean_is_weighted_by_time(tmp_path: Path) -> None:
    events = Events((0, 4, "private"))
    events.state(10.0, 0, 4, "shared")
    events.state(30.0, 0, 4, "private")

    found = over_time_of(Trace(events.write(tmp_path)))

    assert found.mean_shared(40 * MILLISECOND) == pytest.approx(2 * PAGE)
    assert found.peak == (4 * PAGE, 10 * MILLISECOND)


@pytest.mark.parametrize("top", [2220, 2222, 2224])  # wherever in its time slice
def test_points_of_a_large_trace_keep_the_peak(tmp_path: Path, top: int) -> None:
    events = Events((0, RAM, "private"))
    for number in range(4000):
        first = number % RAM // 2 * 2
        if number % 2:
            events.state(number, first, 2, "private")
        else:
            events.state(number, first, 2 if number == top else 1, "shared")
    trace = Trace(events.write(tmp_path))
    over_time = over_time_of(trace)

    times, values = points(over_time, 4000 * MILLISECOND)

    assert len(times) <= 1501
    assert times == sorted(times)
    assert max(values) == over_time.peak[0]
