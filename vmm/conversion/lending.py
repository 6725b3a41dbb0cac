"""Lending private pages to devices, and taking them back: policies asked, accesses waited for,
all of it counted. `vmm.devices.virtio.iommu` says what the guest wants, `vmm.memory.lending` what
a lent page is.

Everything here is called by one at a time: the IOMMU's queue, or its reset.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import Any

from vmm.conversion.observer import LendingObserver
from vmm.conversion.transaction import QUIESCE_TIMEOUT, Converter
from vmm.core.ranges import Range
from vmm.memory.guest_memory import PageState
from vmm.memory.lending import PRIVATE, READ, WRITE, AddressSpace, Endpoint, LendingMemory, Mapping
from vmm.policy import LendEvent

AT_ONCE = 256
"""How many mappings are taken back by one call."""


class LendingCounts:
    """What the report says of lending. Bytes, and pages, count once for each mapping."""

    def __init__(self) -> None:
        self.maps = 0
        self.shared_maps = 0
        """Those of `maps` that were of shared pages, and lent nothing."""
        self.unmaps = 0
        self.denied = 0
        """Requests that a policy has refused."""
        self.failed = 0
        """Requests that were invalid, or could not be carried out."""
        self.lent_bytes_total = 0
        """Mapped private bytes, all together."""
        self.peak_lent_bytes = 0
        """Private bytes that were lent at the same time: all that devices could reach."""
        self.average_lent_bytes = 0
        """Their average over time, from the first mapping to the last change (`over_s`)."""
        self.peak_mappings = 0
        self.peak_runs = 0
        """Runs of pages in equal state: how far lending has cut memory into pieces."""
        self.lent_us: dict[int, int] = {}
        """How long: the number of mappings that were there for less than so many microseconds
        (powers of two), and no less than half as long."""

        # What was lent at the last change, since when, and bytes times nanoseconds until then.
        self._held = self._since = self._first = self._area = 0

    def now_lent(self, lent_bytes: int, now: int) -> None:
        """So many bytes are lent from `now` on."""
        if not self._first:
            self._first = self._since = now
        self._area += self._held * (now - self._since)
        self._held, self._since = lent_bytes, now
        self.peak_lent_bytes = max(self.peak_lent_bytes, lent_bytes)

    def ended(self, nanoseconds: int) -> None:
        limit = 1 << (nanoseconds // 1000).bit_length()
        self.lent_us[limit] = self.lent_us.get(limit, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        counts = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        counts["average_lent_bytes"] = self._area // max(self._since - self._first, 1)
        counts["over_s"] = round((self._since - self._first) / 1e9, 6)
        counts["lent_us"] = {str(limit): self.lent_us[limit] for limit in sorted(self.lent_us)}
        return counts


class Lender:
    """Carries out what the guest asks of its IOMMU. Answers are 0, or an errno."""

    def __init__(
        self,
        memory: LendingMemory,
        converter: Converter,
        *,
        quiesce_timeout: float = QUIESCE_TIMEOUT,
        clock: Callable[[], int] = time.monotonic_ns,
        observer: LendingObserver | None = None,
    ) -> None:
        """`clock` gives nanoseconds."""
        self._memory = memory
        self._converter = converter
        self._patience = quiesce_timeout
        self._clock = clock
        self._observer = observer
        self.counts = LendingCounts()

    @property
    def lends(self) -> bool:
        return self._memory.lends

    @property
    def lent_bytes(self) -> int:
        return self._memory.lent_bytes

    # -- lending ------------------------------------------------------------------------------

    def attach(self, endpoint: Endpoint) -> None:
        """The endpoint has an address space of its own from now on, with nothing in it."""
        endpoint.space = AddressSpace()

    def lend(self, endpoint: Endpoint, iova: int, area: Range, access: int) -> int:
        """Map `area` (whole pages) at `iova` for the endpoint, which is attached.

        EINVAL: something is mapped there, or some pages are shared and some not; EFAULT: no RAM,
        or private pages that can't be lent; EACCES: a policy says no; EBUSY: a page is being
        converted; ENOSPC. Raises PolicyKill, PolicyError.
        """
        began = self._clock()
        answer = self._lend(endpoint, iova, area, access, began)
        counts = self.counts
        if answer == 0:
            counts.maps += 1
        elif answer == errno.EACCES:
            counts.denied += 1
            if self._observer is not None:
                self._observer.lent(endpoint.name, area, access, answer, began)
        else:
            counts.failed += 1
        return answer

    def _lend(self, endpoint: Endpoint, iova: int, area: Range, access: int, began: int) -> int:
        space = endpoint.space
        assert space is not None
        memory = self._memory
        try:
            try:
                mapping = self._map(endpoint, space, iova, area, access, began)
            except OSError as error:
                if error.errno != errno.EAGAIN or PageState.DEFERRED not in memory.kind_of(area):
                    raise
                self._converter.discard_now(area)  # what is lent has one side
                mapping = self._map(endpoint, space, iova, area, access, began)
        except OSError as error:
            number = error.errno or errno.EIO
            return errno.EBUSY if number == errno.EAGAIN else number
        if mapping is None:
            return errno.EACCES
        counts = self.counts
        counts.peak_mappings = max(counts.peak_mappings, memory.mapped)
        if mapping.lent:
            counts.lent_bytes_total += area.size
            counts.now_lent(memory.lent_bytes, began)
            counts.peak_runs = max(counts.peak_runs, memory.runs)
            if self._observer is not None:
                self._observer.lent(endpoint.name, area, access, 0, began)
        else:
            counts.shared_maps += 1
        return 0

    def _map(
        self, endpoint: Endpoint, space: AddressSpace, iova: int, area: Range, access: int, now: int
    ) -> Mapping | None:
        """None: a policy says no. Raises OSError."""
        converter, memory = self._converter, self._memory
        if not converter.hooks.asks_about_lending:
            return memory.map(space, iova, area, access, now)
        with converter.asking:
            low, high = space.within(iova, iova + area.size - 1)
            if low == high and memory.kind_of(area) <= PRIVATE:
                event = _event(endpoint, iova, area, access)
                if not converter.hooks.lending(event, converter.view):
                    return None
            return memory.map(space, iova, area, access, now)

    # -- taking back --------------------------------------------------------------------------

    def take_back(self, endpoint: Endpoint, first: int, last: int) -> tuple[int, bool]:
        """Unmap what lies in [first, last], AT_ONCE mappings at most; whether some are left.

        ERANGE: a mapping lies there in part, so that none is unmapped; EBUSY: accesses under way
        have not ended in time, or EACCES: a policy says no; these mappings stay. Raises
        PolicyKill, PolicyError.
        """
        space = endpoint.space
        assert space is not None
        low, high = space.within(first, last)
        if space.is_split_by(first, last, low, high):
            self.counts.failed += 1
            return errno.ERANGE, False
        some = min(high, low + AT_ONCE)
        allowed = self._allowed_back(endpoint, space.mappings[low:some])
        denied = low + allowed < some
        taken = self._memory.unmap(space, low, low + allowed)
        if not self._memory.drained(taken, self._patience):
            self._memory.put_back(space, taken)
            self.counts.failed += 1
            return errno.EBUSY, False
        self._give_back(endpoint, taken)
        self.counts.unmaps += len(taken)
        if denied:
            self.counts.denied += 1
            return errno.EACCES, False
        return 0, some < high

    def _allowed_back(self, endpoint: Endpoint, mappings: Sequence[Mapping]) -> int:
        """How many of the mappings, from the first on, may be taken back."""
        hooks = self._converter.hooks
        if hooks.asks_about_lending:
            with self._converter.asking:
                for number, mapping in enumerate(mappings):
                    if mapping.lent and not self._ask_back(endpoint, mapping, forced=False):
                        return number
        return len(mappings)

    def _ask_back(self, endpoint: Endpoint, mapping: Mapping, *, forced: bool) -> bool:
        event = _event(endpoint, mapping.iova, mapping.area, mapping.access, forced=forced)
        converter = self._converter
        return converter.hooks.lending(event, converter.view, is_return=True)

    def _give_back(self, endpoint: Endpoint, mappings: Sequence[Mapping]) -> None:
        now = self._clock()
        for mapping in mappings:
            self._memory.take_back(mapping)
            if mapping.lent:
                self.counts.ended(now - mapping.since)
                if self._observer is not None:
                    self._observer.returned(endpoint.name, mapping.area, mapping.since)
        self.counts.now_lent(self._memory.lent_bytes, now)

    def close(self, endpoint: Endpoint, *, wait: bool = False) -> AddressSpace | None:
        """The endpoint reaches nothing from now on; its former space, whose pages are for
        `empty` to give back. None where accesses under way don't end in time: all is as before
        then. With `wait` they are waited for, however long."""
        space = endpoint.space
        assert space is not None
        with self._memory._lock:
            endpoint.space = None
        everything = Range(0, self._memory.ram[-1].end)
        while not self._memory.quiesce(everything, self._patience):
            if not wait:
                endpoint.space = space
                self.counts.failed += 1
                return None
        return space

    def empty(self, endpoint: Endpoint, space: AddressSpace) -> bool:
        """Give back AT_ONCE mappings of a space that is closed; whether some are left.

        Raises PolicyKill, PolicyError, when the pages are back.
        """
        taken = self._memory.unmap(space, 0, min(len(space), AT_ONCE))
        self._give_back(endpoint, taken)
        self.counts.unmaps += len(taken)
        if self._converter.hooks.asks_about_lending:
            with self._converter.asking:
                for mapping in taken:
                    if mapping.lent:
                        self._ask_back(endpoint, mapping, forced=True)
        return bool(len(space))

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "lends": self.lends,
            "lent_bytes": self.lent_bytes,
            "mappings": self._memory.mapped,
            **self.counts.as_dict(),
        }


def _event(
    endpoint: Endpoint, iova: int, area: Range, access: int, *, forced: bool = False
) -> LendEvent:
    return LendEvent(
        endpoint.name, iova, area, bool(access & READ), bool(access & WRITE), forced=forced
    )
