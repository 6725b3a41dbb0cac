"""What if memory may be shared at certain times only? Say, while somebody watches.

--policy vmm.examples.time_window:TimeWindow --policy-arg every=10 --policy-arg open=0.5
"""

from __future__ import annotations

import errno

from vmm.policy import Allow, Decision, Deny, Event, Policy, View


class TimeWindow(Policy):
    """Shares pass in the first `open` seconds of `every` seconds, counted from the start.

    At other times the guest gets EAGAIN. It may make pages private at any time.
    """

    def __init__(self, every: float = 10.0, open: float = 5.0) -> None:
        if not 0 < open <= every:
            raise ValueError(f"every={every}, open={open}: use 0 < open <= every")
        self._every, self._open = every, open
        self._started = 0.0

    def on_boot(self, view: View) -> Decision:
        self._started = view.now
        return Allow()

    def on_share(self, event: Event, view: View) -> Decision:
        is_open = (view.now - self._started) % self._every < self._open
        return Allow() if is_open else Deny(errno.EAGAIN)
