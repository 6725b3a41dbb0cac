"""KeepShared: a pool of shared memory that is kept for the next share of the same pages."""

from __future__ import annotations

import math

from vmm.policy import Allow, Decision, Defer, Event, PageState, Policy, View


class KeepShared(Policy):
    """Keeps the host's side of unshared pages, `limit` bytes at most; what is more is discarded.

    The pages come back with what was in them: for guests that initialise what they share.
    """

    def __init__(self, limit: int = 64 << 20) -> None:
        if limit < 0:
            raise ValueError(f"limit={limit}: give a number of bytes, as in 64M")
        self._limit = limit

    def on_unshare(self, event: Event, view: View) -> Decision:
        states = view.states(event.area)
        more = sum(run.size for run, state in states if state is PageState.SHARED)
        kept = view.bytes_in(PageState.DEFERRED)
        return Defer(math.inf, keep=True) if kept + more <= self._limit else Allow()
