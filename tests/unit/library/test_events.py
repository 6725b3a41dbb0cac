"""A program that follows a machine: every event once, in order, and an end."""

from __future__ import annotations

import threading

import pytest

from vmm.conversion.events import EventFeed, Lost, MachineEvent, Noted
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.library.events import Events
from vmm.library.machine import Machine
from vmm.machine.config import MachineConfig
from vmm.memory.guest_memory import PageState
from vmm.wiring.device_events import DeviceEvents


def followed(capacity: int = 4096) -> tuple[EventFeed, Events]:
    feed, events = EventFeed(), Events(capacity)
    events.follow(feed)
    return feed, events


def test_events_come_in_order_and_end_with_the_machine() -> None:
    feed, events = followed()
    feed.note("paused")
    feed.changed([Range(0, 4096)], PageState.SHARED, 0)
    feed.note("ended", exit="poweroff")

    events.finish()

    names = [getattr(event, "what", "changed") for event in events]
    assert names == ["paused", "changed", "ended"]
    assert list(events) == []


def test_reader_waits_for_the_next_event_on_its_own_thread() -> None:
    feed, events = followed()
    read: list[MachineEvent] = []
    first = threading.Event()

    def reading() -> None:
        for event in events:
            read.append(event)
            first.set()

    reader = threading.Thread(target=reading)
    reader.start()
    feed.note("paused")
    assert first.wait(60)
    feed.note("resumed")
    events.finish()
    reader.join()

    assert [event.what for event in read if isinstance(event, Noted)] == ["paused", "resumed"]


def test_slow_reader_loses_what_comes_late_and_is_told_how_much() -> None:
    feed, events = followed(capacity=2)
    for number in range(5):
        feed.note(str(number))
    events.finish()

    *kept, lost = events

    assert [event.what for event in kept if isinstance(event, Noted)] == ["0", "1"]
    assert isinstance(lost, Lost) and lost.events == 3


def test_machine_that_never_starts_has_no_events() -> None:
    events = Events(1)

    events.finish()

    assert list(events) == []


def test_capacity_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        Events(0)


def test_machine_that_nobody_follows_notes_nothing() -> None:
    machine = Machine(MachineConfig())
    assert machine.follow is None

    machine.events()

    assert machine.follow is not None


def test_events_of_a_machine_that_has_started_are_refused() -> None:
    machine = Machine(MachineConfig(kernel="/nonexistent"))
    with pytest.raises(UsageError, match="/nonexistent"):
        machine.start()

    with pytest.raises(UsageError, match="ask for its events before `start`"):
        machine.events()


def test_device_that_stops_is_an_event_and_a_trace_hears_of_it_too() -> None:
    told: list[str] = []

    class Trace:
        def queue(self, index: int) -> str:
            return f"queue {index}"

        def stopped(self) -> None:
            told.append("stopped")

    feed, events = followed()
    observer = DeviceEvents(feed, "blk0", Trace())  # type: ignore[arg-type]  # as far as needed

    assert observer.queue(3) == "queue 3"  # type: ignore[comparison-overlap]
    observer.stopped()
    DeviceEvents(feed, "rng", None).stopped()
    events.finish()

    assert told == ["stopped"]
    assert [event.details for event in events if isinstance(event, Noted)] == [
        {"device": "blk0"},
        {"device": "rng"},
    ]
