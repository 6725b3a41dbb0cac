"""What happens in a machine, to be iterated over while it runs."""

from __future__ import annotations

import threading
from collections import deque

from vmm.conversion.events import EventFeed, MachineEvent, Subscription
from vmm.core.lean_typing import Self


class Events:
    """An iterator over a machine's events, from its start to its end, for one reader.

    The guest waits for no reader. Where `capacity` events wait to be read, later ones are lost, and
    a Lost in their place says how many. It ends when the machine has.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: at least one event has to find room")
        self._capacity = capacity
        self._subscription: Subscription | None = None
        self._taken: deque[MachineEvent] = deque()
        self._changed = threading.Event()
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MachineEvent:
        """The next event, waited for. Raises StopIteration after the machine's end."""
        while not self._taken:
            # Before looking: the thread that tells of one sets it afterwards.
            self._changed.clear()
            ended = self._ended
            if self._subscription is not None:
                self._taken += self._subscription.take()
            if self._taken:
                break
            if ended:
                raise StopIteration
            self._changed.wait()
        return self._taken.popleft()

    # -- for the machine ----------------------------------------------------------------------

    def follow(self, feed: EventFeed) -> None:
        self._subscription = feed.subscribe(self._changed.set, self._capacity)

    def finish(self) -> None:
        """Nothing more will happen."""
        self._ended = True
        self._changed.set()
