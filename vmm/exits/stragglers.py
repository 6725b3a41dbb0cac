"""Writes that KVM keeps back and that no exit has had carried out: found by looking."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST_SECONDS = 0.01
LONGEST_SECONDS = 1.0


class Stragglers:
    """Looks now and then whether writes to the serial port wait in KVM's ring.

    A driver that asks for the port's status after a character (Linux' do) has it carried out by
    that very exit. A guest that writes its last words and halts, or computes, makes none: it is
    looked after soon after something was found, and then less and less often.
    """

    def __init__(
        self,
        fetch: Callable[[], bool],
        set_timer: Callable[[float, Callable[[], None]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fetch` has what waits carried out and says whether there was anything; `set_timer`
        as EventLoop's, on the time of `clock`."""
        self._fetch = fetch
        self._set_timer = set_timer
        self._clock = clock
        self._pause = SHORTEST_SECONDS

    def look(self) -> None:
        """Look now, and from now on."""
        found = self._fetch()
        self._pause = SHORTEST_SECONDS if found else min(2 * self._pause, LONGEST_SECONDS)
        self._set_timer(self._clock() + self._pause, self.look)
