"""DeferredDiscard: a guest that unshares does not wait for the host to clear up."""

from __future__ import annotations

import math

from vmm.policy import Allow, Decision, Defer, Event, PageState, Policy, View


class DeferredDiscard(Policy):
    """Discards what was unshared together, every `seconds`; `limit` bytes may wait meanwhile.

    As after any unshare the content does not come back, however soon the guest shares again.
    """

    def __init__(self, seconds: float = 1.0, limit: int = 64 << 20) -> None:
        if not seconds > 0 or limit < 0:
            raise ValueError(f"seconds={seconds}, limit={limit}: use > 0 and >= 0")
        self._seconds = seconds
        self._limit = limit

    def on_unshare(self, event: Event, view: View) -> Decision:
        if view.bytes_in(PageState.DEFERRED) + event.area.size > self._limit:
            return Allow()
        # The end of the period: all that comes in it is discarded with few calls.
        return Defer((math.floor(view.now / self._seconds) + 1) * self._seconds)
