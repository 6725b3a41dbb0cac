"""How much memory does a guest need shared, once it runs? Let its boot say, and hold it to that.

--policy vmm.examples.two_phase:TwoPhase --policy-arg seconds=20 --policy-arg slack=4M
"""

from __future__ import annotations

from vmm.policy import Allow, Decision, Deny, Event, PageState, Policy, View


class TwoPhase(Policy):
    """For `seconds` all is allowed; after that the peak of that time and `slack` are the limit."""

    def __init__(self, seconds: float = 20.0, slack: int = 4 << 20) -> None:
        self._seconds, self._slack = seconds, slack
        self._started = 0.0
        self._peak = 0

    def on_boot(self, view: View) -> Decision:
        self._started = view.now
        self._peak = view.bytes_in(PageState.SHARED)
        return Allow()

    def on_share(self, event: Event, view: View) -> Decision:
        states = view.states(event.area)
        more = sum(run.size for run, state in states if state is not PageState.SHARED)
        shared = view.bytes_in(PageState.SHARED) + more
        if view.now - self._started < self._seconds:
            self._peak = max(self._peak, shared)
            return Allow()
        return Allow() if shared <= self._peak + self._slack else Deny()
