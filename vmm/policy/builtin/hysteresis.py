"""Hysteresis: memory that is shared again soon is not given back in between."""

from __future__ import annotations

from vmm.policy import Decision, Defer, Event, Policy, View


class Hysteresis(Policy):
    """Puts the discard of what is unshared off by `seconds`; a share before that cancels it.

    The pages come back with what was in them: for guests that initialise what they share.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds={seconds}: a delay is more than 0")
        self._seconds = seconds

    def on_unshare(self, event: Event, view: View) -> Decision:
        return Defer(view.now + self._seconds, keep=True)
