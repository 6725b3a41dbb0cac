"""How many single-page discards become one of a whole block, if the host waits for the block?

--policy vmm.examples.join_blocks:JoinBlocks --policy-arg block=2M
"""

from __future__ import annotations

import math

from vmm.policy import Allow, Convert, Decision, Defer, Event, PageState, Policy, Range, View

_PRIVATE = (PageState.PRIVATE, PageState.DEFERRED)


class JoinBlocks(Policy):
    """Puts off the discard of unshared pages until the whole aligned block is private again.

    Nothing is discarded before that, so that a page shared again in between costs nothing. Memory
    on the shared side stays taken meanwhile: look at the report's residency.
    """

    def __init__(self, block: int = 2 << 20) -> None:
        if block < 4096 or block & (block - 1):
            raise ValueError(f"block={block}: a power of two is needed, 4K or more")
        self._block = block

    def on_unshare(self, event: Event, view: View) -> Decision:
        area = event.area
        start = area.start // self._block * self._block
        end = -(-area.end // self._block) * self._block
        around = view.states(Range(start, area.start - start))
        around += view.states(Range(area.end, end - area.end))
        if sum(run.size for run, _ in around) < end - start - area.size:
            return Allow()  # where RAM ends, a block can't become whole
        if any(state not in _PRIVATE for _, state in around):
            return Defer(math.inf)
        return Convert(Range(start, end - start))
