"""What may watch conversions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vmm.core.events import ConversionRequest
from vmm.core.ranges import Range
from vmm.memory.guest_memory import PageState
from vmm.policy import Decision


class Answered(NamedTuple):
    """A request that is over."""

    request: ConversionRequest
    decision: Decision | None
    """None: it was invalid, no policy was asked."""
    decided_by: str | None
    """The policy whose word the decision was; None where all simply allowed it."""
    answer: int | None
    """0, a negative errno, or None: the run ends with it."""
    started: int
    """When it came, time.monotonic_ns."""


class ConversionObserver(Protocol):
    """Told of what has happened, with the converter's lock held."""

    def answered(self, what: Answered) -> None: ...

    def changed(self, areas: Sequence[Range], state: PageState, began: int) -> None:
        """`areas` are in `state` now, and were being converted since `began` (monotonic_ns)."""
        ...
