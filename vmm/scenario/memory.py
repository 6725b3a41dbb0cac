"""Guest memory for scenarios: page states are real, and there is nothing in the pages."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.conversion.schemes.plain import PlainScheme
from vmm.core.errors import UnmappedAccess
from vmm.core.ranges import NOWHERE, PAGE_SIZE, Range
from vmm.memory.guest_memory import MOST_RUNS, GuestMemory, PageState
from vmm.replay.replay import ModelBacking


class _Side(ModelBacking):
    def pread(self, size: int, offset: int) -> bytes:
        """No bytes: whether an access is allowed has been asked before it comes here."""
        return b""


class ModelScheme(PlainScheme):
    """No KVM; a fault asks for a conversion, as with the schemes where that can happen."""

    name = "model"
    converts_on_fault = True


class ModelMemory(GuestMemory):
    """Memory of two sides, of which `private` starts private, for one thread that converts and
    touches it: conversions begin and end without locks. Raises OSError."""

    def __init__(self, ram: Sequence[Range], private: Sequence[Range]) -> None:
        size = ram[-1].end
        shared_side, private_side = _Side(size), _Side(size)
        super().__init__(ram, shared_side, private_side, private)
        private_side.state = PageState.PRIVATE
        shared_side.memory = private_side.memory = self
        self._area = NOWHERE

    @property
    def shared_bytes(self) -> int:
        """How many bytes are shared now."""
        return self._states.total(PageState.SHARED)

    @property
    def deferred_bytes(self) -> int:
        """How many bytes wait for their discard now."""
        return self._states.total(PageState.DEFERRED)

    def begin_conversion(
        self, area: Range, target: PageState | None = None
    ) -> list[tuple[Range, PageState]]:
        """As GuestMemory's, of the only conversion there is."""
        states = self._states
        start, size = area
        state = None
        if start >= 0 and start + size <= self._end:
            state = states.uniform(start, start + size)
        if state is not None:
            before = [(area, state)]
        elif self.is_ram(area):
            before = self.states(area)
        else:
            raise UnmappedAccess(f"{area} is not wholly guest RAM")
        if target is not None and len(states) > MOST_RUNS - 2:
            self._require_room(area, target)
        self._free = 0, 0
        self._area = area
        return before

    def finish_conversion(self, state: PageState, runs: Sequence[Range] | None = None) -> None:
        """As GuestMemory's."""
        if runs is None:
            self._states.set(self._area, state)
        else:
            for run in runs:
                self._states.set(run, state)

    def discard(self, gpa: int, size: int) -> None:
        """As GuestMemory's; there is nothing in the pages."""
        if size <= 0 or (gpa | size) % PAGE_SIZE or not self.is_ram(Range(gpa, size)):
            raise UnmappedAccess(f"{size:#x} bytes at {gpa:#x} are not whole pages of RAM")

    def abandon_conversion(self) -> None:
        """As GuestMemory's: nothing has been changed."""
