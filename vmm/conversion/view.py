"""The guest's state as policies see it."""

from __future__ import annotations

from collections.abc import Callable

from vmm.conversion.accounting import Accounting
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory, PageState, Residency
from vmm.policy import Counts


class GuestView:
    """Read-only; implements vmm.policy.View.

    `memory` is there for experiments that have to look behind it and promises nothing.
    """

    __slots__ = ("_accounting", "_clock", "memory")

    def __init__(
        self, memory: GuestMemory, accounting: Accounting, clock: Callable[[], float]
    ) -> None:
        self.memory = memory
        self._accounting = accounting
        self._clock = clock

    @property
    def now(self) -> float:
        return self._clock()

    @property
    def ram_bytes(self) -> int:
        return self.memory.ram_bytes

    def states(self, within: Range | None = None) -> list[tuple[Range, PageState]]:
        return self.memory.states(within)

    def bytes_in(self, state: PageState) -> int:
        return self.memory.most_bytes_in(state)

    def residency(self) -> Residency:
        return self.memory.residency()

    def counts(self, kind: Kind) -> Counts:
        tally = self._accounting.of(kind)
        return Counts(tally.calls, tally.bytes, tally.denied, tally.failed)
