"""What if a page that was shared has to rest before it may be shared again?

Reused pages are where old content leaks. --policy vmm.examples.quarantine:Quarantine
--policy-arg seconds=2
"""

from __future__ import annotations

import errno

from vmm.policy import Allow, Decision, Deny, Event, PageState, Policy, Range, View


class Quarantine(Policy):
    """A page that the guest made private stays so for `seconds`: a share gets EAGAIN.

    Discards aren't put off, so that the host's copy is gone, and a later share starts with zeros.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self._seconds = seconds
        self._resting: list[tuple[float, Range]] = []  # until when, in that order

    def on_unshare(self, event: Event, view: View) -> Decision:
        until = view.now + self._seconds
        runs = view.states(event.area)
        self._resting += [(until, run) for run, state in runs if state is PageState.SHARED]
        return Allow()

    def on_share(self, event: Event, view: View) -> Decision:
        while self._resting and self._resting[0][0] <= view.now:
            self._resting.pop(0)
        area = event.area
        rests = any(r.start < area.end and area.start < r.end for _, r in self._resting)
        return Deny(errno.EAGAIN) if rests else Allow()
