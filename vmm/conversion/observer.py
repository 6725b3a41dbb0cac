"""What may watch conversions."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.core.events import ConversionRequest
from vmm.core.lean_typing import Protocol
from vmm.core.ranges import Range
from vmm.memory.guest_memory import PageState
from vmm.policy import Decision


class LendingObserver(Protocol):
    """Told of private pages that a guest lends to its devices; times are time.monotonic_ns."""

    def lent(self, device: str, area: Range, access: int, answer: int, began: int) -> None:
        """They are mapped for the device (access: vmm.memory.lending's READ, WRITE or both), asked
        for at `began`; or an errno says why not."""
        ...

    def returned(self, device: str, area: Range, since: int) -> None:
        """A mapping that was there `since` then is gone."""
        ...


class ConversionObserver(Protocol):
    """Told of what has happened, with the converter's lock held; times are time.monotonic_ns."""

    def answered(
        self,
        request: ConversionRequest,
        decision: Decision | None,
        decided_by: str | None,
        answer: int | None,
        started: int,
    ) -> None:
        """A request that came at `started` is over.

        No decision: it was invalid. `decided_by`: the policy whose word the decision was; None
        where all simply allowed it. No answer: the run ends with it.
        """
        ...

    def changed(self, areas: Sequence[Range], state: PageState, began: int) -> None:
        """`areas` are in `state` now, and were being converted since `began`."""
        ...
