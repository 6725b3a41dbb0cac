"""Attributes kept by the guest_memfd: a page keeps its place when it changes sides."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvm_bindings import PagesInUse, Vm, ioctls
from vmm.conversion.scheme import private_side, set_slot
from vmm.core import errors
from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.guest_memfd import InPlaceBacking
from vmm.memory.guest_memory import GuestMemory, PageState

PRIVATE, SHARED = ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE, 0

PATIENCE = 1.0
"""Seconds that an unshare waits for pages that somebody still holds."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.05
_MOST_HOLDERS = 32  # told of in a run


class InPlaceScheme:
    """One guest_memfd behind one memslot for each range of RAM; KVM_SET_MEMORY_ATTRIBUTES2 on it
    says which pages the host reaches.

    What a page holds after a conversion is the VM type's business, so that the transaction
    discards it: the guest finds zeros, as under every other scheme.
    """

    name = "in-place"
    alias = 0
    shared_alias = 0
    converts_on_fault = True
    told = True
    side_by_side = True

    def __init__(
        self, patience: float = PATIENCE, told: Callable[[str], None] = errors.tell
    ) -> None:
        """`patience`: seconds to wait for pages in use. `told` gets a sentence for each
        process that holds one of those that aren't given back."""
        self._patience = patience
        self._told = told
        self._known: set[str] = set()

    def install(self, vm: Vm, memory: GuestMemory) -> None:
        backing = private_side(memory, self.name)
        if not memory.in_place or not isinstance(backing, InPlaceBacking):
            raise ValueError("the in-place scheme needs one backing for both sides, of that kind")
        self._memory = memory
        self._guest_memfd = backing.guest_memfd
        for number, area in enumerate(memory.ram):
            set_slot(vm, number, area.start, area, backing)
        for run, state in memory.states():
            self._set(run, SHARED if state is PageState.SHARED else PRIVATE)

    def apply(self, area: Range, kind: Kind) -> None:
        self._set(area, SHARED if kind is Kind.SHARE else PRIVATE)

    def revert(self, area: Range, kind: Kind) -> None:
        self._set(area, PRIVATE if kind is Kind.SHARE else SHARED)

    def _set(self, area: Range, attribute: int) -> None:
        """KVM refuses, as a whole, to make pages private that somebody holds: a system call of
        the host's that is under way, or a page on its way through a pipe. They let go of it."""
        deadline = time.monotonic() + self._patience
        pause = _FIRST_PAUSE
        while True:
            try:
                self._guest_memfd.set_memory_attributes2(area.start, area.size, attribute)
                return
            except PagesInUse as busy:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._tell_holders(busy.offset)
                    raise
                self._memory.quiesce(Range(busy.offset, PAGE_SIZE), left)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _tell_holders(self, offset: int) -> None:
        from vmm.conversion.holders import holders  # where all is well, nobody asks

        for holder in holders(self._guest_memfd.fd, offset):
            if holder not in self._known and len(self._known) < _MOST_HOLDERS:
                self._known.add(holder)
                self._told(f"the page at {offset:#x} can't be made private: {holder}")
