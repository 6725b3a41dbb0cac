"""What happens in a machine, as events for what follows it: the control socket, a program.

One feed for each machine. Each subscriber has a buffer of its own, of bounded size: a reader
that is slow loses events and is told how many, and nothing waits for it.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from vmm.core.events import ConversionRequest
from vmm.core.lean_typing import TYPE_CHECKING, Any, NamedTuple
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import PageState
from vmm.policy import Decision
from vmm.policy.decisions import word_of

if TYPE_CHECKING:
    from vmm.conversion.observer import ConversionObserver

CAPACITY = 4096
"""Events that wait for one subscriber; later ones are lost to it until it has taken these."""
MOST_AREAS = 64
"""A change of more ranges than this is several events."""


class Requested(NamedTuple):
    """A share or unshare request is over, as the guest put it: nothing in it is validated.

    `seconds` since the run's start; `decision` is the policies' word ("allow", "deny", ...), None
    for a request that was invalid, `decided_by` the policy whose word it was, None where all
    simply allowed it. `errno` is the answer: 0, the number of an error, None where the run ended
    with it. `took` seconds from the request to its answer.
    """

    seconds: float
    kind: str
    gpa: int
    size: int
    vcpu: int
    doorbell: str
    decision: str | None
    decided_by: str | None
    errno: int | None
    took: float


class Changed(NamedTuple):
    """The pages of `areas` are in `state` now."""

    seconds: float
    state: PageState
    areas: tuple[Range, ...]


class Noted(NamedTuple):
    """The machine is "paused", "resumed" or "ended", or a device is stopped until the guest resets
    it ("device-stopped": it named memory that is private or not there, or broke a ring's rules);
    `details` say how, or which."""

    seconds: float
    what: str
    details: dict[str, Any]


class Lost(NamedTuple):
    """Here so many `events` are missing: their reader was too slow."""

    seconds: float
    events: int


MachineEvent = Requested | Changed | Noted | Lost


class Subscription:
    """One reader's share of the feed. Any thread may call."""

    def __init__(self, feed: EventFeed, capacity: int, wake: Callable[[], None]) -> None:
        self._feed = feed
        self._capacity = capacity
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: deque[MachineEvent] = deque()
        self._lost = 0

    def put(self, event: MachineEvent) -> None:
        """For the feed. Calls `wake` when there was nothing to take before."""
        with self._lock:
            if self._lost or len(self._waiting) >= self._capacity:
                self._lost += 1
                return
            was_empty = not self._waiting
            self._waiting.append(event)
        if was_empty:
            self._wake()

    def take(self, most: int = CAPACITY) -> list[MachineEvent]:
        """The next events, at most `most` and one that says how many are lost; [] for none."""
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            if self._lost and not self._waiting:
                taken.append(Lost(self._feed.seconds(), self._lost))
                self._lost = 0
        return taken

    def close(self) -> None:
        """No more events; any number of times."""
        self._feed.unsubscribe(self)


class EventFeed:
    """A ConversionObserver that hands on what it is told; while nobody follows, to `also` alone."""

    def __init__(self, also: ConversionObserver | None = None) -> None:
        """`also`: another observer, a trace's, which is told first."""
        self._also = also
        self._origin = time.monotonic()
        self._lock = threading.Lock()
        # Replaced, never changed: the thread that tells them takes no lock.
        self._subscriptions: tuple[Subscription, ...] = ()

    def seconds(self) -> float:
        """Since the feed was made, which is when the machine was."""
        return time.monotonic() - self._origin

    def subscribe(
        self, wake: Callable[[], None] = lambda: None, capacity: int = CAPACITY
    ) -> Subscription:
        """All events from now on. `wake` is called when there is something to take after there was
        nothing, on whichever thread it happened: it must not wait, nor call anything here."""
        made = Subscription(self, capacity, wake)
        with self._lock:
            self._subscriptions += (made,)
        return made

    def unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)

    def note(self, what: str, **details: Any) -> None:
        """The machine is paused, resumed or ended."""
        self._tell(Noted(self.seconds(), what, details))

    def _tell(self, event: MachineEvent) -> None:
        for subscription in self._subscriptions:
            subscription.put(event)

    # -- ConversionObserver -------------------------------------------------------------------

    def answered(
        self,
        request: ConversionRequest,
        decision: Decision | None,
        decided_by: str | None,
        answer: int | None,
        started: int,
    ) -> None:
        if self._also is not None:
            self._also.answered(request, decision, decided_by, answer, started)
        if self._subscriptions:
            now, began = time.monotonic(), started / 1e9
            event = Requested(
                began - self._origin,
                request.kind.value,
                request.gpa,
                request.pages * PAGE_SIZE,
                request.vcpu,
                request.doorbell,
                None if decision is None else word_of(decision),
                decided_by,
                None if answer is None else -answer,
                now - began,
            )
            self._tell(event)

    def changed(self, areas: Sequence[Range], state: PageState, began: int) -> None:
        if self._also is not None:
            self._also.changed(areas, state, began)
        if self._subscriptions:
            now = self.seconds()
            for first in range(0, len(areas), MOST_AREAS):
                self._tell(Changed(now, state, tuple(areas[first : first + MOST_AREAS])))


def as_json(event: MachineEvent) -> dict[str, Any]:
    """An event as JSON-ready data, whose keys are stable; vmm/docs/reference/control.md."""
    at = round(event.seconds, 6)
    if isinstance(event, Requested):
        number = event.errno
        answer = None if number is None else errno.errorcode.get(number, str(number))
        return {
            "event": event.kind,
            "s": at,
            "gpa": event.gpa,
            "bytes": event.size,
            "vcpu": event.vcpu,
            "doorbell": event.doorbell,
            "decision": event.decision,
            "decided_by": event.decided_by,
            "answer": "ok" if number == 0 else answer,
            "took_s": round(event.took, 6),
        }
    if isinstance(event, Changed):
        areas = [*map(list, event.areas)]
        return {"event": "state", "s": at, "state": event.state.value, "areas": areas}
    if isinstance(event, Lost):
        return {"event": "lost", "s": at, "count": event.events}
    return {"event": event.what, "s": at, **event.details}
