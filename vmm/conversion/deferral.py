"""When the shared sides of deferred pages are to be discarded."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vmm.core.ranges import Range, RangeMap


class DueTimes:
    """A time for every deferred page. Not locked: the converter serialises changes."""

    def __init__(self, span: Range) -> None:
        self._times: RangeMap[tuple[float, bool] | None] = RangeMap(span, None)

    def put(self, area: Range, due: float, keep: bool) -> None:
        """`keep`: a share before `due` finds the content of before."""
        self._times.set(area, (due, keep))

    def retry(self, area: Range, due: float) -> None:
        """Give `area` another time; what is kept stays so."""
        for run, entry in list(self._times.runs(area)):
            if entry is not None:
                self._times.set(run, (due, entry[1]))

    def not_kept(self, area: Range) -> list[Range]:
        """The deferred parts of `area` whose content must not come back."""
        return [run for run, entry in self._times.runs(area) if entry is not None and not entry[1]]

    def clear(self, area: Range) -> None:
        """`area` is (partly) deferred no longer."""
        self._times.set(area, None)

    def expired(self, now: float) -> Iterator[Range]:
        """The ranges due by `now`, neighbours joined whenever they were put off."""
        joined: Range | None = None
        for run, entry in list(self._times.runs()):
            if entry is None or entry[0] > now:
                continue
            if joined is not None and joined.end == run.start:
                joined = Range(joined.start, joined.size + run.size)
                continue
            if joined is not None:
                yield joined
            joined = run
        if joined is not None:
            yield joined

    def next(self) -> float:
        """The earliest time, math.inf when there is none."""
        times = (entry[0] for _, entry in self._times.runs() if entry is not None)
        return min(times, default=math.inf)
