"""Coalesce: many small unshares side by side become one conversion."""

from __future__ import annotations

import math

from vmm.policy import Convert, Decision, Defer, Event, PageState, Policy, Range, View


class Coalesce(Policy):
    """Collects neighbouring unshares until `size` bytes have come together, for `seconds` at most.

    Linux gives memory back page by page: one discard for all of it is cheaper than one each.
    """

    def __init__(self, size: int = 2 << 20, seconds: float = 0.1) -> None:
        if size <= 0 or size % 4096 or not seconds > 0:
            raise ValueError(f"size={size}, seconds={seconds}: use whole pages and more than 0")
        self._size = size
        self._seconds = seconds

    def on_unshare(self, event: Event, view: View) -> Decision:
        whole = self._with_neighbours(event.area, view)
        if whole.size >= self._size:
            return Convert(whole)
        # One time for all that comes in the same period, or each would be discarded by itself.
        return Defer((math.floor(view.now / self._seconds) + 1) * self._seconds)

    def _with_neighbours(self, area: Range, view: View) -> Range:
        """`area` and the deferred pages on both sides of it, as far as `size` reaches."""
        start, end = area.start, area.end
        low = max(0, start - self._size)
        for run, state in reversed(view.states(Range(low, start - low))):
            if state is not PageState.DEFERRED or run.end != start:
                break
            start = run.start
        for run, state in view.states(Range(end, self._size)):
            if state is not PageState.DEFERRED or run.start != end:
                break
            end = run.end
        return Range(start, end - start)
