"""What if no share is larger than a piece? The guest gets the first piece, and asks again.

Linux 6.12 does not look at the answer, so try this with scenarios and guests of your own.
--policy vmm.examples.in_pieces:InPieces --policy-arg piece=256K
"""

from __future__ import annotations

from vmm.policy import Allow, Decision, Event, PageState, Partial, Policy, Range, View


class InPieces(Policy):
    """Grants at most `piece` bytes that are new with each request; the rest is EAGAIN."""

    def __init__(self, piece: int = 256 << 10) -> None:
        if piece < 4096 or piece % 4096:
            raise ValueError(f"piece={piece}: give whole pages, as in 256K")
        self._piece = piece

    def on_share(self, event: Event, view: View) -> Decision:
        area, left = event.area, self._piece
        for run, state in view.states(area):
            if state is PageState.SHARED:
                continue
            if run.size > left:
                return Partial(Range(area.start, run.start + left - area.start))
            left -= run.size
        return Allow()
