"""Late discards: what is due next is known without a look at the rest, and a guest that makes many
runs of them holds nobody up."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.conversion import Answering, RecordingScheme, share, unshare
from tests.support.memory import guest_memory, page, pages
from vmm.conversion import transaction
from vmm.conversion.deferral import BYTES_AT_ONCE, RUNS_AT_ONCE, DueTimes
from vmm.conversion.transaction import Converter
from vmm.core.ranges import Range, RangeMap
from vmm.memory import guest_memory as module
from vmm.memory.guest_memory import PageState
from vmm.policy import Allow, Decision, Defer, Event, Policy, View

SPAN = pages(0, 4096)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the runs that are walked."""
    count = [0]
    runs = RangeMap.runs

    def counting(each: RangeMap[Any], within: Range | None = None) -> Iterator[Any]:
        for run in runs(each, within):
            count[0] += 1
            yield run

    monkeypatch.setattr(RangeMap, "runs", counting)
    return count


def test_one_that_is_due_is_found_without_a_look_at_the_others(steps: list[int]) -> None:
    due = DueTimes(SPAN)
    for number in range(0, 4096, 2):
        due.put(pages(number, 1), 1.0 + number, keep=False)

    taken = due.take_expired(1.0)
    due.clear(taken[0])

    assert taken == [pages(0, 1)]
    assert due.next() == 3.0
    assert steps == [1]


def test_so_many_are_taken_at_once_and_the_rest_is_due_at_once_again() -> None:
    due = DueTimes(SPAN)
    for number in range(0, 4096, 2):
        due.put(pages(number, 1), 1.0 + number, keep=False)
    rounds = 0

    while due.next() <= 1e6:
        taken = due.take_expired(1e6)
        assert 0 < len(taken) <= RUNS_AT_ONCE
        for area in taken:
            due.clear(area)
        rounds += 1

    assert rounds == 2048 // RUNS_AT_ONCE
    assert len(due) == 1


def test_large_range_is_discarded_in_parts() -> None:
    due = DueTimes(Range(0, 1 << 30))
    due.put(Range(0, 1 << 30), 1.0, keep=False)
    start = 0

    while due.next() < math.inf:
        (area,) = due.take_expired(1.0)
        assert (area.start, area.size) == (start, BYTES_AT_ONCE)
        due.clear(area)
        start = area.end

    assert start == 1 << 30


def test_range_that_was_torn_to_pieces_is_walked_in_parts(steps: list[int]) -> None:
    due = DueTimes(SPAN)
    due.put(SPAN, 1.0, keep=False)
    for number in range(0, 4096, 2):
        due.clear(pages(number, 1))
    steps[0] = 0

    taken = due.take_expired(1.0)

    assert len(taken) == RUNS_AT_ONCE // 2
    assert steps[0] <= RUNS_AT_ONCE + 1


def test_deferring_and_sharing_for_ever_makes_nothing_longer() -> None:
    due = DueTimes(SPAN)
    for number in range(10_000):
        due.put(pages(number % 7, 1), 1e6 + number, keep=False)
        due.clear(pages(number % 7, 1))
        due.put(pages(100, 1), math.inf, keep=True)

    assert len(due._next) <= 2 * len(due) + 65
    assert due.next() == math.inf


ACTION = st.tuples(
    st.sampled_from(("put", "keep", "clear", "retry", "take")),
    st.integers(0, 31), st.integers(1, 12), st.sampled_from((1.0, 2.0, 3.0, math.inf)),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTION, max_size=30))
def test_due_times_are_those_of_a_dict_of_pages(
    actions: list[tuple[str, int, int, float]],
) -> None:
    due = DueTimes(pages(0, 32))
    model: dict[int, tuple[float, bool]] = {}
    for action, first, count, when in actions:
        area = pages(first, min(count, 32 - first))
        numbers = range(first, first + area.size // page(1))
        match action:
            case "put" | "keep":
                due.put(area, when, action == "keep")
                model |= dict.fromkeys(numbers, (when, action == "keep"))
            case "clear":
                due.clear(area)
                for n in numbers:
                    model.pop(n, None)
            case "retry":
                due.retry(area, when)
                model |= {n: (when, model[n][1]) for n in numbers if n in model}
            case "take":
                now = min(when, 3.0)
                taken = due.take_expired(now)
                found = [n for a in taken for n in range(a.start >> 12, a.end >> 12)]
                assert found == sorted(n for n, (at, _) in model.items() if at <= now)
                for a in taken:
                    due.clear(a)
                for n in found:
                    del model[n]
        assert due.next() == min((at for at, _ in model.values()), default=math.inf)
        gone = [n for a in due.not_kept(pages(0, 32)) for n in range(a.start >> 12, a.end >> 12)]
        assert gone == sorted(n for n, (_, keep) in model.items() if not keep)


# -- in a converter -------------------------------------------------------------------------------


class Later(Policy):
    """Each unshare at a time of its own."""

    def __init__(self) -> None:
        self._until = 100.0

    def on_unshare(self, event: Event, view: View) -> Decision:
        self._until += 1e-3
        return Defer(self._until)


def test_settle_discards_some_and_asks_to_be_woken_for_the_rest_at_once(
    steps: list[int],
) -> None:
    wakes: list[float] = []
    now = [0.0]
    with guest_memory(ram=(pages(0, 512),)) as memory:
        converter = Converter(
            memory, RecordingScheme(memory), Later(), clock=lambda: now[0], wake_at=wakes.append
        )
        for number in range(0, 512, 2):
            converter.convert(unshare(number, 1))
        now[0], turns = 200.0, 0
        while memory.bytes_in(PageState.DEFERRED):
            before = memory.bytes_in(PageState.DEFERRED)
            steps[0] = 0
            converter.settle()
            turns += 1
            assert before - memory.bytes_in(PageState.DEFERRED) == page(RUNS_AT_ONCE)
            assert steps[0] <= 2 * RUNS_AT_ONCE + 1
            if memory.bytes_in(PageState.DEFERRED):
                assert wakes[-1] <= now[0]

        assert turns == 256 // RUNS_AT_ONCE


def test_late_discards_have_an_end_and_the_guest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours that are due at different times are one run of deferred pages, and many here."""
    monkeypatch.setattr(transaction, "MOST_RUNS", 16)
    with guest_memory() as memory:
        converter = Converter(memory, RecordingScheme(memory), Later(), clock=lambda: 0.0)

        answers = [converter.convert(unshare(number, 1)) for number in range(40)]

        assert set(answers) == {0, -errno.ENOSPC}
        assert converter._due is not None and len(converter._due) <= 16
        assert memory.bytes_in(PageState.DEFERRED) == page(answers.count(0))
        assert converter.accounting.unshare.failed == answers.count(-errno.ENOSPC)


def test_guest_that_makes_too_many_runs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RUNS", 16)
    with guest_memory() as memory:
        converter = Converter(memory, RecordingScheme(memory), Answering(Allow()))
        answers = [converter.convert(unshare(number, 1)) for number in range(0, 64, 2)]

        assert answers == [0] * 8 + [-errno.ENOSPC] * 24
        assert converter.convert(unshare(1, 1)) == 0  # joins two
        assert converter.convert(share(0, 64)) == 0
        assert memory.states() == [(pages(0, 64), PageState.SHARED)]
