"""RateLimit: a token bucket in front of shares."""

from __future__ import annotations

import errno

from vmm.policy import Allow, Decision, Deny, Event, Policy, View


class RateLimit(Policy):
    """Lets `burst` shares through at once and `per_second` in the long run; the others get EBUSY.

    Only shares that are let through cost a token. Unshares are free.
    """

    def __init__(self, per_second: float, burst: int = 1) -> None:
        if not per_second > 0 or burst < 1:
            raise ValueError(f"per_second={per_second}, burst={burst}: use > 0 and >= 1")
        self._per_second = per_second
        self._burst = burst
        self._tokens = float(burst)
        self._seen: float | None = None

    def on_share(self, event: Event, view: View) -> Decision:
        now = view.now
        if self._seen is not None:
            earned = (now - self._seen) * self._per_second
            self._tokens = min(float(self._burst), self._tokens + earned)
        self._seen = now
        if self._tokens < 1:
            return Deny(errno.EBUSY)
        self._tokens -= 1
        return Allow()
