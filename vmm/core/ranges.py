"""Address ranges, and a map from addresses to values that stores runs instead of pages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

PAGE_SIZE = 4096
PAGE_SHIFT = 12


def page_align_down(value: int) -> int:
    """`value` rounded down to a page boundary (bytes)."""
    return value & ~(PAGE_SIZE - 1)


def page_align_up(value: int) -> int:
    """`value` rounded up to a page boundary (bytes)."""
    return (value + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


class Range(NamedTuple):
    """`size` bytes of addresses from `start`; `end` is the first address past them."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size

    def contains(self, other: Range) -> bool:
        start, size = other
        return self.start <= start and start + size <= self.start + self.size

    def overlaps(self, other: Range) -> bool:
        """Whether they have an address in common; an empty range has none."""
        return max(self.start, other.start) < min(self.end, other.end)

    def split(self, address: int) -> tuple[Range, Range]:
        """What lies below `address` and what doesn't; either may be empty."""
        middle = min(max(address, self.start), self.end)
        return Range(self.start, middle - self.start), Range(middle, self.end - middle)

    def intersection(self, other: Range) -> Range | None:
        start = max(self.start, other.start)
        end = min(self.end, other.end)
        return Range(start, end - start) if start < end else None

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


class RangeMap(Generic[T]):
    """A value for every address of `span`, kept as maximal runs of equal values.

    Lookups cost a bisection, changes cost the number of runs that they touch: a range of a
    gigabyte is one run, not 262,144 pages. Not locked: the owner serialises changes.
    """

    __slots__ = ("_starts", "_values", "span")

    def __init__(self, span: Range, value: T) -> None:
        self.span = span
        self._starts = [span.start]
        self._values = [value]

    def get(self, address: int) -> T:
        """The value at `address`, which must lie in the span."""
        return self._values[bisect_right(self._starts, address) - 1]

    def is_uniform(self, start: int, end: int, value: T) -> bool:
        """Whether every address in [start, end) has `value`; the range must lie in the span."""
        index = bisect_right(self._starts, start) - 1
        if self._values[index] != value:
            return False
        return index + 1 == len(self._starts) or end <= self._starts[index + 1]

    def runs(self, within: Range | None = None) -> Iterator[tuple[Range, T]]:
        """The maximal runs, clipped to `within` (default: the whole span), in address order."""
        limit = self.span if within is None else self.span.intersection(within)
        if limit is None:
            return
        index = bisect_right(self._starts, limit.start) - 1
        start = limit.start
        while start < limit.end:
            last = index + 1 == len(self._starts)
            end = limit.end if last else min(limit.end, self._starts[index + 1])
            yield Range(start, end - start), self._values[index]
            start = end
            index += 1

    def set(self, target: Range, value: T) -> None:
        """Give every address of `target` (inside the span) the value, merging equal neighbours."""
        if target.size <= 0 or not self.span.contains(target):
            raise ValueError(f"range {target} is not inside the map's span {self.span}")
        first = bisect_right(self._starts, target.start) - 1
        if self._grow(first, target, value):
            return
        last = bisect_right(self._starts, target.end - 1) - 1
        starts: list[int] = []
        values: list[T] = []
        if self._starts[first] < target.start:
            starts.append(self._starts[first])
            values.append(self._values[first])
        starts.append(target.start)
        values.append(value)
        last_end = self._starts[last + 1] if last + 1 < len(self._starts) else self.span.end
        if target.end < last_end:
            starts.append(target.end)
            values.append(self._values[last])
        # One neighbour on either side joins the splice, so that equal runs merge across it.
        low, high = max(first - 1, 0), min(last + 2, len(self._starts))
        starts = self._starts[low:first] + starts + self._starts[last + 1 : high]
        values = self._values[low:first] + values + self._values[last + 1 : high]
        keep = [i for i in range(len(starts)) if i == 0 or values[i] != values[i - 1]]
        self._starts[low:high] = [starts[i] for i in keep]
        self._values[low:high] = [values[i] for i in keep]

    def _grow(self, index: int, target: Range, value: T) -> bool:
        """Move the boundary between run `index` and the one before it to the end of `target`.

        True when that is all there is to do: `target` starts `index`, leaves something of it, and
        the run before has the value. It is what a guest does that converts page after page.
        """
        starts = self._starts
        if index == 0 or starts[index] != target.start or self._values[index - 1] != value:
            return False
        end = starts[index + 1] if index + 1 < len(starts) else self.span.end
        if target.end >= end:
            return False
        starts[index] = target.end
        return True

    def total(self, value: T) -> int:
        """How many addresses (bytes) have `value`."""
        return sum(run.size for run, held in self.runs() if held == value)
