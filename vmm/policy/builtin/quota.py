"""Quota: a bound on how much memory is shared, or lent, at once."""

from __future__ import annotations

from vmm.policy import Allow, Decision, Deny, Event, LendEvent, PageState, Policy, View


class Quota(Policy):
    """Refuses what would make more than `limit` bytes shared, or lent to devices.

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
        return self._answer(view, more)

    def on_lend(self, event: LendEvent, view: View) -> Decision:
        states = view.states(event.area)
        return self._answer(view, sum(run.size for run, s in states if s is not PageState.LENT))

    def _answer(self, view: View, more: int) -> Decision:
        exposed = view.bytes_in(PageState.SHARED) + view.bytes_in(PageState.LENT)
        return Deny() if more and exposed + more > self._limit else Allow()
