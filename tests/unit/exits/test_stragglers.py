"""Looking after writes that KVM keeps back: at which times, and what is fetched."""

from __future__ import annotations

from collections.abc import Callable

from vmm.exits.stragglers import LONGEST_SECONDS, SHORTEST_SECONDS, Stragglers


class FakeRunner:
    """Shows one place in the ring after another; counts how often it is told to fetch."""

    def __init__(self, places: list[int | None]) -> None:
        self.places = places
        self.fetched = 0

    @property
    def oldest_coalesced_write(self) -> int | None:
        return self.places.pop(0)

    def carry_out_coalesced_writes(self) -> None:
        self.fetched += 1


class Clock:
    """Time that goes on to the timer that was set, when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []
        self._callback: Callable[[], None] | None = None

    def set_timer(self, when: float, callback: Callable[[], None]) -> None:
        self.waits.append(round(when - self.now, 6))
        self._callback = callback

    def fire(self) -> None:
        self.now += self.waits[-1]
        assert self._callback is not None
        self._callback()


def look(*places: int | None) -> tuple[list[float], int]:
    """The waits after looks that find these, and how often something was fetched."""
    clock, runner = Clock(), FakeRunner(list(places))
    Stragglers(runner, clock.set_timer, lambda: clock.now).look()
    while runner.places:
        clock.fire()
    return clock.waits, runner.fetched


def test_looks_become_rare_where_nothing_is_found() -> None:
    waits, fetched = look(*[None] * 20)

    assert waits[0] == 2 * SHORTEST_SECONDS
    assert waits == sorted(waits)
    assert waits[-10:] == [LONGEST_SECONDS] * 10
    assert fetched == 0


def test_write_that_is_still_there_is_fetched_and_the_next_ones_soon() -> None:
    waits, fetched = look(*[None] * 10, 5, 5, None, None)

    assert fetched == 1
    assert [wait / SHORTEST_SECONDS for wait in waits[-4:]] == [1, 1, 2, 4]


def test_console_in_full_use_is_left_alone_and_looked_at_twice_a_second() -> None:
    """Every look finds a character that waits for the exit that follows it."""
    waits, fetched = look(*range(40))

    assert fetched == 0
    assert waits[-4:] == [SHORTEST_SECONDS, LONGEST_SECONDS] * 2


def test_guest_that_never_makes_exits_is_served_again_and_again() -> None:
    waits, fetched = look(7, 7, 8, 8, 9, 9)

    assert fetched == 3
    assert waits == [SHORTEST_SECONDS] * 6


def test_fetching_that_waits_for_the_consoles_reader_is_not_repeated_without_end() -> None:
    waits, fetched = look(*[7] * 20)

    assert waits[:3] == [SHORTEST_SECONDS, SHORTEST_SECONDS, 2 * SHORTEST_SECONDS]
    assert waits[-10:] == [LONGEST_SECONDS] * 10
    assert fetched == 19
