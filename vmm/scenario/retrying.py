"""What drivers do when they are told to try again."""

from __future__ import annotations

import errno
from collections.abc import Generator
from typing import NamedTuple

from vmm.scenario.steps import Share, Step, Unshare, Wait

TRY_AGAIN = (-errno.EAGAIN, -errno.EBUSY)


class Retry(NamedTuple):
    """A request that is made up to `tries` times, `pause` seconds apart, while the answer is
    EAGAIN or EBUSY: `answer = yield from Retry(Share(area), 3, 0.001).steps()`."""

    request: Share | Unshare
    tries: int
    pause: float

    def steps(self) -> Generator[Step, int, int]:
        """Its steps; returns the last answer."""
        answer = yield self.request
        for _ in range(self.tries - 1):
            if answer not in TRY_AGAIN:
                break
            yield Wait(self.pause)
            answer = yield self.request
        return answer
