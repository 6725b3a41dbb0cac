"""A turn's budget, and how much one call may be asked to do."""

from __future__ import annotations

import pytest

from vmm.devices.virtio import budget
from vmm.devices.virtio.budget import LOOK_EVERY, TURN_BYTES, TURN_CALLS, Budget, Pace


class Clock:
    """Time that a test sets; `looks` counts who asked for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


def test_budget_is_spent_after_so_many_calls() -> None:
    turn = Budget(Clock())

    calls = 1
    while turn.spend():
        calls += 1

    assert calls == TURN_CALLS
    assert turn.spent


def test_budget_is_spent_after_so_many_bytes() -> None:
    turn = Budget(Clock())

    assert turn.spend(size=TURN_BYTES - 1)
    assert turn.size_left == 1
    assert not turn.spend(size=1)
    assert turn.size_left == 0


def test_budget_is_spent_when_time_is_up_at_the_next_look() -> None:
    clock = Clock()
    turn = Budget(clock)
    clock.now = 1.0

    steps = 1
    while turn.spend():
        steps += 1

    assert steps == LOOK_EVERY
    assert clock.looks == 2  # at the start, and then


def test_budget_looks_at_the_clock_at_once_when_told_to() -> None:
    clock = Clock()
    turn = Budget(clock)
    assert turn.look()
    clock.now = 1.0

    assert not turn.look()


def test_budget_that_begins_anew_is_whole() -> None:
    clock = Clock()
    turn = Budget(clock)
    turn.spend(TURN_CALLS, TURN_BYTES)
    turn.descriptors_left = 0
    clock.now = 5.0

    turn.begin()

    assert turn.look() and not turn.spent
    assert turn.size_left == TURN_BYTES
    assert turn.descriptors_left == budget.TURN_DESCRIPTORS


def test_budget_takes_no_more_descriptors_than_a_turn_has() -> None:
    turn = Budget(Clock())
    assert turn.left_to_take() == (budget.TURN_DESCRIPTORS, TURN_BYTES)

    turn.descriptors_left -= budget.TURN_DESCRIPTORS

    assert turn.left_to_take()[0] == 0
    assert not turn.spent  # what was taken is carried out


def test_budget_takes_nothing_once_it_is_spent() -> None:
    turn = Budget(Clock())

    turn.spend(size=TURN_BYTES)

    assert turn.left_to_take()[0] == 0


def test_pace_falls_where_a_call_is_slow_and_rises_where_it_is_quick() -> None:
    pace = Pace()
    start = pace.limit

    pace.took(start, 1.0)
    assert pace.limit == start // 2
    pace.took(start // 2, 0.0)
    assert pace.limit == start


@pytest.mark.parametrize(("seconds", "limit"), [(1.0, Pace.LEAST), (0.0, Pace.MOST)])
def test_pace_has_bounds(seconds: float, limit: int) -> None:
    pace = Pace()

    for _ in range(100):
        pace.took(pace.limit, seconds)

    assert pace.limit == limit


def test_pace_does_not_rise_for_small_calls() -> None:
    pace = Pace()
    start = pace.limit

    pace.took(4096, 0.0)

    assert pace.limit == start
