"""When the shared sides of deferred pages are to be discarded."""

from __future__ import annotations

import heapq
import math

from vmm.core.ranges import Range, RangeMap

RUNS_AT_ONCE = 64
BYTES_AT_ONCE = 16 << 20
"""How much is discarded at once: a guest that unshares every second page has made many runs, and
the device loop, which discards them, has to go on."""

_STALE = 64


class DueTimes:
    """A time for every deferred page. Not locked: the converter serialises changes.

    A map says what is so, a heap what comes next. What was put into the heap and is no longer so
    is dropped when it comes up, or when there is more of it than of the rest.
    """

    def __init__(self, span: Range) -> None:
        self._times: RangeMap[tuple[float, bool] | None] = RangeMap(span, None)
        self._next: list[tuple[float, int, int]] = []  # (due, start, end)

    def __len__(self) -> int:
        """How many runs of pages there are that are due together, or not at all."""
        return len(self._times)

    def put(self, area: Range, due: float, keep: bool) -> None:
        """`keep`: a share before `due` finds the content of before."""
        self._times.set(area, (due, keep))
        if due < math.inf:
            heapq.heappush(self._next, (due, area.start, area.end))
            if len(self._next) > 2 * len(self._times) + _STALE:
                self._rebuild()

    def _rebuild(self) -> None:
        entries = ((run, entry) for run, entry in self._times.runs() if entry is not None)
        self._next = [(due, run.start, run.end) for run, (due, _) in entries if due < math.inf]
        heapq.heapify(self._next)

    def retry(self, area: Range, due: float) -> None:
        """Give `area` another time; what is kept stays so."""
        for run, entry in list(self._times.runs(area)):
            if entry is not None:
                self.put(run, due, entry[1])

    def not_kept(self, area: Range) -> list[Range]:
        """The deferred parts of `area` whose content must not come back."""
        return [run for run, entry in self._times.runs(area) if entry is not None and not entry[1]]

    def waiting(self, area: Range) -> list[Range]:
        """The deferred parts of `area`, neighbours joined."""
        return _joined([run for run, entry in self._times.runs(area) if entry is not None])

    def clear(self, area: Range) -> None:
        """`area` is (partly) deferred no longer."""
        self._times.set(area, None)

    def take_expired(
        self, now: float, runs: int = RUNS_AT_ONCE, size: int = BYTES_AT_ONCE
    ) -> list[Range]:
        """Ranges due by `now`, neighbours joined, of so many runs and bytes at most.

        They come up no more: the caller follows with `clear` or `retry` for each.
        """
        taken: list[Range] = []
        while self._next and self._next[0][0] <= now and runs > 0 and size > 0:
            due, start, end = heapq.heappop(self._next)
            found: list[tuple[Range, bool]] = []
            for run, entry in self._times.runs(Range(start, end - start)):
                if runs == 0 or size == 0:
                    break
                runs -= 1
                start = run.end
                if entry is not None and entry[0] <= now:
                    area, rest = run.split(run.start + size)
                    start = rest.start
                    size -= area.size
                    found.append((area, entry[1]))
            if start < end:
                heapq.heappush(self._next, (due, start, end))
            for area, keep in found:
                self._times.set(area, (math.inf, keep))
                taken.append(area)
        return _joined(taken)

    def next(self) -> float:
        """The earliest time, math.inf when there is none."""
        while self._next:
            due, start, end = self._next[0]
            entries = self._times.values(Range(start, end - start))
            if any(entry is not None and entry[0] == due for entry in entries):
                return due
            heapq.heappop(self._next)
        return math.inf


def _joined(areas: list[Range]) -> list[Range]:
    """Disjoint ranges in address order, those that meet as one."""
    joined: list[Range] = []
    for area in sorted(areas):
        if joined and joined[-1].end == area.start:
            joined[-1] = Range(joined[-1].start, joined[-1].size + area.size)
        else:
            joined.append(area)
    return joined
