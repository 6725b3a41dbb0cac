"""What a scenario knows of its guest, and the memory that it may use."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from vmm.core.ranges import PAGE_SIZE, Range, page_align_up


class Guest:
    """One vCPU of a guest, as its scenario sees it. All of a guest's vCPUs have the same memory.

    `rng` gives the same numbers for the same seed and vCPU; take no others, so that a run can be
    repeated.
    """

    def __init__(
        self,
        ram: Sequence[Range],
        vcpu: int,
        cpus: int,
        rng: Random,
        clock: Callable[[], float],
        heap: Heap,
        common: dict[str, Any],
    ) -> None:
        self.ram = tuple(ram)
        """Guest RAM, by guest-physical address."""
        self.vcpu = vcpu
        """This vCPU's number, from 0."""
        self.cpus = cpus
        self.rng = rng
        self.common = common
        """For what the vCPUs of one guest tell each other."""
        self._clock = clock
        self._heap = heap

    @property
    def now(self) -> float:
        """Seconds since the guest's start; what policies see as view.now."""
        return self._clock()

    @property
    def ram_bytes(self) -> int:
        return sum(area.size for area in self.ram)

    def allocate(self, size: int, align: int = PAGE_SIZE) -> Range:
        """Memory that nobody else has allocated, in whole pages, lowest addresses first; `align`
        in bytes. Raises MemoryError."""
        return self._heap.allocate(size, align)

    def free(self, area: Range) -> None:
        """Give back what `allocate` gave."""
        self._heap.free(area)

    def random_area(self, most: int, align: int = PAGE_SIZE) -> Range:
        """Some whole pages anywhere in RAM, `most` bytes at most; others may use them, too."""
        ram = self.rng.choice([area for area in self.ram if area.size])
        size = min(self.rng.randrange(1, max(most // PAGE_SIZE, 1) + 1) * PAGE_SIZE, ram.size)
        places = (ram.size - size) // align + 1
        return Range(ram.start + self.rng.randrange(places) * align, size)


class Heap:
    """Guest memory that can be allocated: free ranges, in address order. First fit."""

    def __init__(self, ram: Sequence[Range]) -> None:
        self._free = sorted(ram)
        self._taken: dict[int, int] = {}

    def allocate(self, size: int, align: int) -> Range:
        """Raises MemoryError where there is no room, ValueError for a size or an alignment that
        is none."""
        if size <= 0 or align < PAGE_SIZE or align & (align - 1):
            raise ValueError(f"allocate({size}, {align}): bytes, and a power of two of 4096 up")
        size = page_align_up(size)
        for index, place in enumerate(self._free):
            start = (place.start + align - 1) & -align
            if start + size <= place.end:
                self._free[index : index + 1] = place.without(Range(start, size))
                self._taken[start] = size
                return Range(start, size)
        left = sum(each.size for each in self._free)
        raise MemoryError(f"{size} bytes of guest memory in a row; {left} are free in all")

    def free(self, area: Range) -> None:
        """Raises ValueError for what wasn't allocated."""
        start, size = area
        if self._taken.get(start) != page_align_up(size):
            raise ValueError(f"{area} was not allocated")
        end = start + self._taken.pop(start)
        free = self._free
        low = high = bisect_left(free, (start, 0))
        if low and free[low - 1].end == start:
            low -= 1
            start = free[low].start
        if high < len(free) and free[high].start == end:
            end = free[high].end
            high += 1
        free[low:high] = [Range(start, end - start)]
