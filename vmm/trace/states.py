"""Page states over time, worked out from a trace's state rows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from vmm.core.errors import UsageError
from vmm.core.ranges import PAGE_SHIFT, PAGE_SIZE
from vmm.trace.arrays import Integers, np
from vmm.trace.layout import MOST_MEMORY, Kind
from vmm.trace.reader import Trace

STATES = ("none", "shared", "private", "deferred")
NONE, SHARED, PRIVATE, DEFERRED = range(4)
_MOST_WORK = 1 << 34
"""Pages that all changes together may cover: some seconds of work, 131,000 changes of 512 MiB."""
_NUMBERS = {name: number for number, name in enumerate(STATES)}


class StateRows(NamedTuple):
    """The changes in the order in which they were done; `end` is when, in ns."""

    began: Integers
    end: Integers
    gpa: Integers
    bytes: Integers
    state: Integers


def state_rows(trace: Trace) -> StateRows:
    """The trace's state rows: the converter's lock was held, so that they are in order."""
    rows = np.flatnonzero(trace["kind"] == Kind.STATE)
    began = trace["time_ns"][rows]
    end = began + trace["latency_ns"][rows]
    numbers = np.zeros(1 << 16, np.uint8)
    for number, name in enumerate(trace.names):
        numbers[number] = _NUMBERS.get(name, NONE)
    state = numbers[trace["detail"][rows] & 0xFFFF]
    # No guest has memory beyond, whatever a damaged trace says: the sums stay small.
    gpa, size = (np.minimum(trace[name][rows], MOST_MEMORY) for name in ("gpa", "bytes"))
    return StateRows(began, end, gpa, size, state)


def initial_states(trace: Trace) -> list[tuple[int, int, int]]:
    """(gpa, bytes, state) of guest RAM when the guest started."""
    states = trace.facts.get("states", [])
    return [(gpa, size, _NUMBERS.get(state, NONE)) for gpa, size, state in states]


def is_told(trace: Trace) -> bool:
    """Whether the host was told of the guest's conversions: else there are none in the trace, and
    its pages were observed."""
    return not any(state == "observed" for _, _, state in trace.facts.get("states", []))


def span_bytes(initial: Sequence[tuple[int, int, int]], rows: StateRows) -> int:
    """Where guest memory ends: what the sidecar says; for one that says nothing, the last row."""
    if initial:
        return max(gpa + size for gpa, size, _ in initial)
    return min(int((rows.gpa + rows.bytes).max()), MOST_MEMORY) if len(rows.gpa) else 0


class BytesOverTime(NamedTuple):
    """How much is shared, and deferred, from each of the times `end` (ns) on; first at 0."""

    end: Integers
    shared: Integers
    deferred: Integers

    @property
    def peak(self) -> tuple[int, int]:
        """The most bytes shared at once, and the time in ns."""
        at = int(np.argmax(self.shared))
        return int(self.shared[at]), int(self.end[at])

    def mean_shared(self, until: int) -> float:
        """Bytes shared on average from the start to `until` (ns)."""
        return self._mean(self.shared, until)

    def mean_deferred(self, until: int) -> float:
        """Bytes on average whose shared side was still to be discarded, as `mean_shared`."""
        return self._mean(self.deferred, until)

    def _mean(self, values: Integers, until: int) -> float:
        durations = np.diff(np.append(self.end, max(until, int(self.end[-1])))).astype(np.float64)
        total = durations.sum()
        return float((durations * values).sum() / total) if total else float(values[-1])


def bytes_over_time(rows: StateRows, initial: Sequence[tuple[int, int, int]]) -> BytesOverTime:
    """One step for each state row. A page that was in that state already is not counted twice."""
    pages = bytearray(-(-span_bytes(initial, rows) // PAGE_SIZE))
    for gpa, size, state in initial:
        _fill(pages, gpa, size, state)
    several = rows.bytes[rows.bytes != PAGE_SIZE]
    work = int(np.minimum(several >> PAGE_SHIFT, len(pages)).sum(dtype=np.uint64))
    if work > _MOST_WORK:
        raise UsageError(
            f"the trace's {len(several)} changes of page states cover {work} pages in all; "
            f"{_MOST_WORK} at most are followed: it is damaged, or split the run"
        )
    shared, deferred = pages.count(SHARED), pages.count(DEFERRED)
    shared_steps, deferred_steps = array("q", [shared]), array("q", [deferred])
    for start in range(0, len(rows.gpa), 1 << 18):
        part = slice(start, start + (1 << 18))
        columns = (rows.gpa[part], rows.bytes[part], rows.state[part])
        for gpa, size, state in zip(*(column.tolist() for column in columns), strict=True):
            first = gpa >> PAGE_SHIFT
            if size == PAGE_SIZE and first < len(pages):
                before = pages[first]
                shared += (state == SHARED) - (before == SHARED)
                deferred += (state == DEFERRED) - (before == DEFERRED)
                pages[first] = state
            else:
                last = (gpa + size) >> PAGE_SHIFT
                shared -= pages.count(SHARED, first, last)
                deferred -= pages.count(DEFERRED, first, last)
                filled = _fill(pages, gpa, size, state)
                shared += filled * (state == SHARED)
                deferred += filled * (state == DEFERRED)
            shared_steps.append(shared)
            deferred_steps.append(deferred)
    end = np.concatenate([np.zeros(1, rows.end.dtype), rows.end])
    return BytesOverTime(
        end,
        np.frombuffer(shared_steps, np.int64) * PAGE_SIZE,
        np.frombuffer(deferred_steps, np.int64) * PAGE_SIZE,
    )


def _fill(pages: bytearray, gpa: int, size: int, state: int) -> int:
    """Set whole pages inside the map; how many those are."""
    first, last = gpa >> PAGE_SHIFT, min((gpa + size) >> PAGE_SHIFT, len(pages))
    count = max(last - first, 0)
    if count:
        pages[first:last] = bytes((state,)) * count
    return count
