"""Looking after writes that KVM keeps back: at which times, and what is found."""

from __future__ import annotations

from collections.abc import Callable

from vmm.exits.stragglers import LONGEST_SECONDS, SHORTEST_SECONDS, Stragglers


class Clock:
    """Time that goes on to the timer that was set, when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []
        self._callback: Callable[[], None] | None = None

    def set_timer(self, when: float, callback: Callable[[], None]) -> None:
        self.waits.append(when - self.now)
        self._callback = callback

    def fire(self) -> None:
        self.now += self.waits[-1]
        assert self._callback is not None
        self._callback()


def look(*found: bool) -> list[float]:
    """The waits between looks that find something, or don't."""
    clock, left = Clock(), list(found)
    stragglers = Stragglers(lambda: left.pop(0), clock.set_timer, lambda: clock.now)
    stragglers.look()
    while left:
        clock.fire()
    return [round(wait, 6) for wait in clock.waits]


def test_looks_become_rare_where_nothing_is_found() -> None:
    waits = look(*[False] * 20)

    assert waits[0] == 2 * SHORTEST_SECONDS
    assert waits == sorted(waits)
    assert waits[-10:] == [LONGEST_SECONDS] * 10


def test_look_that_found_something_is_followed_by_one_soon() -> None:
    waits = look(*[False] * 10, True, True, False)

    assert waits[-3:] == [SHORTEST_SECONDS, SHORTEST_SECONDS, 2 * SHORTEST_SECONDS]
