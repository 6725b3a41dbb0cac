"""RateLimit: a token bucket in front of shares."""

from __future__ import annotations

import errno
from typing import Any

from vmm.policy import Allow, Decision, Deny, Event, Policy, View
from vmm.policy.builtin.saved import number


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

    def on_save(self, view: View) -> object:
        return {"tokens": self._tokens_at(view.now)}

    def on_restore(self, state: Any, view: View) -> None:
        self._tokens = min(float(self._burst), number(state, "tokens"))
        self._seen = view.now

    def on_share(self, event: Event, view: View) -> Decision:
        now = view.now
        self._tokens, self._seen = self._tokens_at(now), now
        if self._tokens < 1:
            return Deny(errno.EBUSY)
        self._tokens -= 1
        return Allow()

    def _tokens_at(self, now: float) -> float:
        if self._seen is None:
            return self._tokens
        earned = (now - self._seen) * self._per_second
        return min(float(self._burst), self._tokens + earned)
