"""The feed of events: what is told, to whom, and readers that are slow."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support.conversion import RecordingScheme, share, unshare
from tests.support.memory import guest_memory, page, pages
from vmm.conversion.events import (
    MOST_AREAS,
    Changed,
    EventFeed,
    Lost,
    Noted,
    Requested,
    as_json,
)
from vmm.conversion.transaction import Converter
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Decision, Deny, Event, Policy, View


class NoSharing(Policy):
    def on_share(self, event: Event, view: View) -> Decision:
        return Deny()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 pages, 32..63 private."""
    with guest_memory(pages(32, 32)) as made:
        yield made


def test_conversion_is_told_as_a_change_and_then_as_an_answer(memory: GuestMemory) -> None:
    feed = EventFeed()
    follower = feed.subscribe()

    Converter(memory, RecordingScheme(memory), observer=feed).convert(share(40, 4))

    changed, requested = follower.take()
    assert isinstance(changed, Changed) and isinstance(requested, Requested)
    assert changed[1:] == (PageState.SHARED, (pages(40, 4),))
    assert requested[1:9] == ("share", page(40), page(4), 0, "test", "allow", None, 0)
    assert 0 <= requested.seconds <= changed.seconds
    assert follower.take() == []


def test_refusal_is_told_with_the_policy_whose_word_it_was(memory: GuestMemory) -> None:
    feed = EventFeed()
    follower = feed.subscribe()

    Converter(memory, RecordingScheme(memory), NoSharing(), observer=feed).convert(share(40, 1))

    (event,) = follower.take()
    told = as_json(event)
    assert (told["decision"], told["decided_by"], told["answer"]) == ("deny", "NoSharing", "EACCES")


def test_invalid_request_is_told_without_a_decision(memory: GuestMemory) -> None:
    feed = EventFeed()
    follower = feed.subscribe()

    Converter(memory, RecordingScheme(memory), observer=feed).convert(share(1 << 50, 1))

    told = as_json(follower.take()[0])
    assert (told["decision"], told["answer"]) == (None, "EINVAL")


def test_slow_reader_keeps_the_first_events_and_is_told_how_many_are_lost() -> None:
    feed = EventFeed()
    follower = feed.subscribe(capacity=3)

    for number in range(10):
        feed.note("paused", number=number)

    assert [as_json(event).get("number") for event in follower.take(2)] == [0, 1]
    last, lost = follower.take()
    assert as_json(last)["number"] == 2
    assert isinstance(lost, Lost) and lost.events == 7
    feed.note("resumed")
    (after,) = follower.take()
    assert isinstance(after, Noted) and after.what == "resumed"


def test_events_after_a_loss_wait_until_the_reader_knows_of_it() -> None:
    feed = EventFeed()
    follower = feed.subscribe(capacity=2)
    for _ in range(3):
        feed.note("paused")
    follower.take(1)

    feed.note("resumed")  # there is room, but it would stand before the loss

    taken = follower.take()
    assert [as_json(event)["event"] for event in taken] == ["paused", "lost"]
    assert isinstance(taken[-1], Lost) and taken[-1].events == 2


def test_reader_is_woken_once_for_what_it_has_not_taken() -> None:
    feed, woken = EventFeed(), list[int]()
    follower = feed.subscribe(lambda: woken.append(1))

    feed.note("paused")
    feed.note("resumed")
    follower.take()
    feed.note("paused")

    assert len(woken) == 2


def test_reader_that_has_closed_is_told_nothing_and_others_are() -> None:
    feed = EventFeed()
    gone, there = feed.subscribe(), feed.subscribe()

    gone.close()
    gone.close()
    feed.note("ended", exit="poweroff")

    assert gone.take() == []
    assert as_json(there.take()[0])["exit"] == "poweroff"


def test_change_of_many_ranges_is_several_events() -> None:
    feed = EventFeed()
    follower = feed.subscribe()
    areas = [pages(2 * number, 1) for number in range(MOST_AREAS + 1)]

    feed.changed(areas, PageState.SHARED, 0)

    told = [event.areas for event in follower.take() if isinstance(event, Changed)]
    assert [len(each) for each in told] == [MOST_AREAS, 1]
    assert [area for each in told for area in each] == areas


def test_other_observer_is_told_whether_anybody_follows_or_not(memory: GuestMemory) -> None:
    calls: list[str] = []

    class Noting:
        def answered(self, *_: object) -> None:
            calls.append("answered")

        def changed(self, *_: object) -> None:
            calls.append("changed")

    Converter(memory, RecordingScheme(memory), observer=EventFeed(Noting())).convert(unshare(0, 1))

    assert calls == ["changed", "answered"]


def test_event_is_a_line_of_json() -> None:
    event = Changed(1.25, PageState.SHARED, (Range(4096, 8192),))

    assert json.loads(json.dumps(as_json(event))) == {
        "event": "state", "s": 1.25, "state": "shared", "areas": [[4096, 8192]]
    }  # fmt: skip
