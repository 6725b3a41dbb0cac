"""Quota: a bound on how much memory is shared at once."""

from __future__ import annotations

from vmm.policy import Allow, Decision, Deny, Event, PageState, Policy, View


class Quota(Policy):
    """Refuses a share that would make more than `limit` bytes shared.

    What starts shared counts, pages that are shared already are not counted twice, and deferred
    pages count as private, which they are to the guest.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit={limit}: give a number of bytes, as in 80M")
        self._limit = limit

    def on_share(self, event: Event, view: View) -> Decision:
        states = view.states(event.area)
        more = sum(run.size for run, state in states if state is not PageState.SHARED)
        if more and view.bytes_in(PageState.SHARED) + more > self._limit:
            return Deny()
        return Allow()
