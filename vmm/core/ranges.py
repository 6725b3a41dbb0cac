"""Address ranges, and a map from addresses to values that stores runs instead of pages."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from vmm.core.lean_typing import Generic, NamedTuple, TypeVar

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

    def without(self, hole: Range) -> list[Range]:
        """What of it lies before and behind `hole`."""
        if not hole.size:
            return [self] if self.size else []
        before, rest = self.split(hole.start)
        behind = rest.split(hole.end)[1]
        return [piece for piece in (before, behind) if piece.size]

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


NOWHERE = Range(0, 0)
"""An empty range, where there is nothing of the kind."""


class Cut(NamedTuple, Generic[T]):
    """Runs that were copied out of a map: `starts` and `values` of equal length."""

    span: Range
    starts: list[int]
    values: list[T]


class RangeMap(Generic[T]):
    """A value for every address of `span`, kept as maximal runs of equal values.

    Lookups cost a bisection; a change costs the number of runs that it touches, and moving the
    runs behind it (10 microseconds with 32,768 of them): code that lets others make runs
    bounds their number (`len`, `growth`). A range of a gigabyte is one run, not 262,144 pages. Not
    locked: the owner serialises changes.
    """

    __slots__ = ("_starts", "_totals", "_values", "span")

    def __init__(self, span: Range, value: T) -> None:
        self.span = span
        self._starts = [span.start]
        self._values = [value]
        self._totals = {value: span.size}

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self._starts)

    def get(self, address: int) -> T:
        """The value at `address`, which must lie in the span."""
        return self._values[bisect_right(self._starts, address) - 1]

    def is_uniform(self, start: int, end: int, value: T) -> bool:
        """Whether every address in [start, end) has `value`; the range must lie in the span."""
        index = bisect_right(self._starts, start) - 1
        if self._values[index] != value:
            return False
        return index + 1 == len(self._starts) or end <= self._starts[index + 1]

    def uniform(self, start: int, end: int) -> T | None:
        """The value that every address in [start, end) of the span has, None if they differ."""
        starts = self._starts
        index = bisect_right(starts, start)
        return self._values[index - 1] if index == len(starts) or end <= starts[index] else None

    def run_at(self, address: int) -> tuple[int, int]:
        """Start and end of the run that `address`, which must lie in the span, is in."""
        starts = self._starts
        after = bisect_right(starts, address)
        return starts[after - 1], self.span.end if after == len(starts) else starts[after]

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

    def cut(self, within: Range | None = None) -> Cut[T] | None:
        """The map as it is now, or the part of it `within` a range; None where there is none.

        Two slices are copied: what is to be walked is cut out under the owner's lock, and walked
        without it (`of`).
        """
        span = self.span if within is None else self.span.intersection(within)
        if span is None:
            return None
        first = bisect_right(self._starts, span.start) - 1
        last = bisect_left(self._starts, span.end, first)
        return Cut(span, self._starts[first:last], self._values[first:last])

    @classmethod
    def of(cls, cut: Cut[T]) -> RangeMap[T]:
        """The map that `cut`, which it takes over, was cut out of."""
        made = cls.__new__(cls)
        made.span, made._starts, made._values = cut
        made._starts[0] = cut.span.start
        totals: dict[T, int] = {}
        ends = [*made._starts[1:], cut.span.end]
        for start, end, value in zip(made._starts, ends, made._values, strict=True):
            totals[value] = totals.get(value, 0) + end - start
        made._totals = totals
        return made

    def values(self, within: Range) -> set[T]:
        """The values that addresses `within` a range have."""
        area = self.span.intersection(within)
        if area is None:
            return set()
        first = bisect_right(self._starts, area.start) - 1
        return set(self._values[first : bisect_left(self._starts, area.end, first)])

    def count(self, value: T) -> int:
        """How many runs have `value`."""
        return self._values.count(value)

    def total(self, value: T) -> int:
        """How many addresses (bytes) have `value`; kept up to date, not added up."""
        return self._totals.get(value, 0)

    def growth(self, target: Range, value: T) -> int:
        """By how many runs `set` would change the map, 2 at most. Raises ValueError as `set`."""
        first, last = self._touched(target)
        low, high, starts, _ = self._splice(target, value, first, last)
        return len(starts) - (high - low)

    def set(self, target: Range, value: T) -> None:
        """Give every address of `target` (inside the span) the value, merging equal neighbours.

        Raises ValueError for a range that is empty or outside.
        """
        start, size = target
        end, span, starts = start + size, self.span, self._starts
        first = bisect_right(starts, start) - 1
        inside = size > 0 and start >= span.start and end <= span.start + span.size
        if inside and (first + 1 == len(starts) or end <= starts[first + 1]):
            if self._values[first] != value:
                self._set_within(first, start, end, value)
            return
        first, last = self._touched(target)
        self._move_runs(first, last, target, value)
        low, high, new_starts, new_values = self._splice(target, value, first, last)
        self._starts[low:high] = new_starts
        self._values[low:high] = new_values

    def _set_within(self, index: int, start: int, end: int, value: T) -> None:
        """`set` for a part of one run, which is what most changes are: nothing is built for it."""
        starts, values = self._starts, self._values
        old, after = values[index], index + 1
        self._move(old, value, end - start)
        is_last = after == len(starts)
        at_start = starts[index] == start
        at_end = end == (self.span.end if is_last else starts[after])
        joins_before = at_start and index > 0 and values[index - 1] == value
        joins_after = at_end and not is_last and values[after] == value
        if at_start and at_end:
            values[index] = value
            low, high = after - joins_before, after + joins_after
            if low < high:
                del starts[low:high], values[low:high]
        elif joins_before:
            starts[index] = end
        elif joins_after:
            starts[after] = start
        elif at_start:
            starts.insert(after, end)
            values.insert(index, value)
        elif at_end:
            starts.insert(after, start)
            values.insert(after, value)
        else:
            starts[after:after] = (start, end)
            values[after:after] = (value, old)

    def _touched(self, target: Range) -> tuple[int, int]:
        """The runs [first, last) that `target` has a part of."""
        start, size = target
        end, span = start + size, self.span
        if size <= 0 or start < span.start or end > span.start + span.size:
            raise ValueError(f"range {target} is not inside the map's span {span}")
        first = bisect_right(self._starts, start) - 1
        return first, bisect_left(self._starts, end, first + 1)

    def _splice(
        self, target: Range, value: T, first: int, last: int
    ) -> tuple[int, int, list[int], list[T]]:
        """What `set` puts in the place of runs [low, high): their starts and their values."""
        starts, values = self._starts, self._values
        start = target.start
        end = start + target.size
        new_starts: list[int] = []
        new_values: list[T] = []
        # What stays on the left is the rest of the first run, or the run before it.
        low = first + 1 if starts[first] < start else first
        if low == 0 or values[low - 1] != value:
            new_starts.append(start)
            new_values.append(value)
        # On the right it is the rest of the last run, or the run after it, which joins.
        at_end = last == len(starts)
        high = last
        if end < (self.span.end if at_end else starts[last]):
            if values[last - 1] != value:
                new_starts.append(end)
                new_values.append(values[last - 1])
        elif not at_end and values[last] == value:
            high += 1
        return low, high, new_starts, new_values

    def _move_runs(self, first: int, last: int, target: Range, value: T) -> None:
        start, end = target.start, target.start + target.size
        for index in range(first, last):
            stop = end if index + 1 == last else self._starts[index + 1]
            self._move(self._values[index], value, stop - max(start, self._starts[index]))

    def _move(self, old: T, new: T, size: int) -> None:
        """`size` addresses have changed their value."""
        totals = self._totals
        left = totals[old] - size
        if left:
            totals[old] = left
        else:
            del totals[old]
        totals[new] = totals.get(new, 0) + size
