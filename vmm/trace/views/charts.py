"""What charts show, worked out from a trace: small enough for a page, whatever the trace's size."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from vmm.core.ranges import PAGE_SHIFT
from vmm.trace.arrays import Integers, np
from vmm.trace.layout import DECISIONS, KIND_NAMES, Kind, decision_name
from vmm.trace.reader import Trace
from vmm.trace.states import NONE, BytesOverTime, StateRows, initial_states, span_bytes
from vmm.trace.summary import errno_name, rows_by_device

MOST_RECTANGLES = 40_000
_EXACT_STEPS = 4000
_BLOCKS, _STEPS = 2048, 600
"""How finely a trace is drawn that has more changes than rectangles."""
_MOST_WORK = 1 << 34
"""Blocks that all steps together may look at: some seconds."""
_MOST_BLOCKS = 1 << 22
"""What there is memory for, some 45 bytes each: pages of 16 GiB of RAM."""
_BINS = 240
_MOST_POINTS = 1500
_BINS_PER_DECADE = 8
_ALLOW = DECISIONS.index("allow")


class Rectangles(NamedTuple):
    """Blocks `first` to `first + blocks` were in `state` from `start` to `end` (ns).

    A block is `block_bytes`: a page, or in large traces more; then the last change counts.
    """

    block_bytes: int
    start: Integers
    end: Integers
    first: Integers
    blocks: Integers
    state: Integers


def rectangles(
    rows: StateRows, initial: list[tuple[int, int, int]], until: int, most: int = MOST_RECTANGLES
) -> Rectangles:
    """The states of all RAM from 0 to `until` (ns): exact as long as it takes at most `most`."""
    shift, steps = PAGE_SHIFT, _EXACT_STEPS
    if len(rows.gpa) > most:
        steps = _STEPS
        while span_bytes(initial, rows) >> shift > _BLOCKS:
            shift += 1
    # Each step may look at all blocks.
    span = span_bytes(initial, rows)
    looks = min(steps, len(rows.gpa) + 1)
    while span >> shift > _MOST_BLOCKS or (span >> shift) * looks > _MOST_WORK:
        shift += 1
    while True:
        found = _Sweep(rows, initial, until, shift).run(steps)
        if len(found.start) <= most or shift > 40:
            return found
        shift, steps = shift + 1, max(steps * 3 // 4, 100)


class _Sweep:
    """Applies the rows in order and closes a rectangle whenever a block's state has changed."""

    def __init__(
        self, rows: StateRows, initial: list[tuple[int, int, int]], until: int, shift: int
    ) -> None:
        self._rows = rows
        self._until = until
        self._shift = shift
        blocks = -(-span_bytes(initial, rows) // (1 << shift))
        self._state = np.zeros(blocks, np.uint8)
        for gpa, size, state in initial:
            self._state[gpa >> shift : -(-(gpa + size) // (1 << shift))] = state
        self._shown = self._state.copy()
        self._since = np.zeros(blocks, np.int64)
        self._closed: list[tuple[Integers, Integers, Integers, Integers, Integers]] = []

    def run(self, steps: int) -> Rectangles:
        rows, shift = self._rows, np.uint64(self._shift)
        first = (rows.gpa >> shift).tolist()
        round_up = np.uint64((1 << self._shift) - 1)
        last = ((rows.gpa + rows.bytes + round_up) >> shift).tolist()
        states = rows.state.tolist()
        bounds = self._bounds(steps)
        for low, high in itertools.pairwise(bounds):
            if low == high:
                continue
            for index in range(low, high):
                self._state[first[index] : last[index]] = states[index]
            self._close(min(first[low:high]), max(last[low:high]), int(rows.end[high - 1]))
        self._close(0, len(self._state), self._until, everything=True)
        empty = np.empty(0, np.int64)
        columns = zip((empty,) * 5, *self._closed, strict=True)
        return Rectangles(1 << self._shift, *map(np.concatenate, columns))

    def _bounds(self, steps: int) -> list[int]:
        """Indexes of rows between which the picture is looked at."""
        count = len(self._rows.end)
        if count <= steps:
            return list(range(count + 1))
        times = np.linspace(0, self._until, steps + 1)[1:-1]
        inner: list[int] = np.searchsorted(self._rows.end, times).tolist()
        return [0, *inner, count]

    def _close(self, first: int, last: int, now: int, everything: bool = False) -> None:
        shown, since = self._shown[first:last], self._since[first:last]
        state = self._state[first:last]
        changed = np.flatnonzero(shown if everything else shown != state)
        if not len(changed):
            return
        was, began = shown[changed], since[changed]
        breaks = (np.diff(changed) > 1) | (np.diff(was) != 0) | (began[1:] != began[:-1])
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        counts = np.diff(np.append(starts, len(changed)))
        ends = np.full(len(starts), now, np.int64)
        keep = was[starts] != NONE
        columns = (began[starts], ends, changed[starts] + first, counts, was[starts])
        self._closed.append(tuple(column[keep] for column in columns))
        shown[changed] = state[changed]
        since[changed] = now


def longest_conversions(rows: StateRows, most: int = 3000) -> Integers:
    """Indexes of the rows whose pages were converting longest."""
    if len(rows.gpa) <= most:
        return np.arange(len(rows.gpa))
    return np.argpartition(rows.began - rows.end, most)[:most]


def points(over_time: BytesOverTime, until: int) -> tuple[list[int], list[int]]:
    """Times (ns) and bytes shared from then on; in large traces the most of each time slice."""
    times, values = over_time.end, over_time.shared
    if len(times) > _MOST_POINTS:
        slots = np.minimum(
            times * np.uint64(_MOST_POINTS) // np.uint64(max(until, 1)), _MOST_POINTS
        )
        starts = np.flatnonzero(np.diff(slots, prepend=slots.dtype.type(0))).tolist()
        starts = sorted({0, *starts})
        values = np.maximum.reduceat(values, starts)
        times = times[starts]
    return times.tolist(), values.tolist()


def latency_histogram(trace: Trace) -> dict[str, Any]:
    """Requests that were carried out, by latency: `edges` in ns, a count for each bin."""
    done = {
        name: trace["latency_ns"][(trace["kind"] == kind) & (trace["errno"] == 0)]
        for name, kind in (("share", Kind.SHARE), ("unshare", Kind.UNSHARE))
    }
    both = np.concatenate([*done.values(), np.empty(0, np.uint64)])
    if not len(both):
        return {"edges": [], "share": [], "unshare": []}
    low, high = (int(10 * np.log10(max(int(v), 1))) / 10 for v in (both.min(), both.max()))
    bins = max(int((high - low) * _BINS_PER_DECADE) + 2, 4)
    edges = np.logspace(low - 0.05, low - 0.05 + bins / _BINS_PER_DECADE, bins + 1)
    return {
        "edges": [round(edge) for edge in edges.tolist()],
        **{name: np.histogram(values, edges)[0].tolist() for name, values in done.items()},
    }


def io_over_time(trace: Trace, until: int) -> dict[str, dict[str, list[int]]]:
    """Bytes in each of the equal time slices, for every device and direction."""
    result: dict[str, dict[str, list[int]]] = {}
    for direction, kind in (("to_guest", Kind.IO_IN), ("from_guest", Kind.IO_OUT)):
        for name, mine in rows_by_device(trace, (kind,)):
            moved = _binned(trace["time_ns"][mine], until, trace["bytes"][mine])
            empty: dict[str, list[int]] = {"to_guest": [0] * _BINS, "from_guest": [0] * _BINS}
            result.setdefault(name, empty)[direction] = moved
    return result


def exits_over_time(trace: Trace, until: int) -> list[int]:
    """Exits in each of the equal time slices."""
    return _binned(trace["time_ns"][trace["kind"] == Kind.EXIT], until)


def _binned(times: Integers, until: int, weights: Integers | None = None) -> list[int]:
    if weights is not None:
        weights = weights.astype(np.float64)  # sums of a damaged trace's sizes pass 64 bits
    heights, _ = np.histogram(times, _BINS, (0, max(until, 1)), weights=weights)
    return [int(height) for height in heights.tolist()]


def decided_requests(trace: Trace, most: int = 4000) -> dict[str, Any]:
    """Share and unshare requests, and devices that were stopped, for tracks in time.

    `words` is what was decided, `rows` columns of time (ns), GPA, bytes, the word's number, and
    numbers of `names`: what was asked for, the answer ("" where it was done), the policy. Of
    more than `most` those that were allowed and done are thinned out first.
    """
    kinds = trace["kind"]
    asked = (kinds == Kind.SHARE) | (kinds == Kind.UNSHARE)
    rows = np.flatnonzero(asked | (kinds == Kind.IO_REFUSED))
    plain = (trace["errno"][rows] == 0) & (trace["decision"][rows] == _ALLOW) & asked[rows]
    special = _thinned(rows[~plain], most)
    rows = np.sort(np.concatenate([special, _thinned(rows[plain], most - len(special))]))
    words: dict[str, int] = {}
    names: dict[str, int] = {"": 0}
    found: list[list[int]] = [[] for _ in range(7)]
    picked = (trace[n][rows].tolist() for n in ("time_ns", "gpa", "bytes", "kind", "decision",
                                                "errno", "detail"))  # fmt: skip
    for at, gpa, size, kind, decision, number, detail in zip(*picked, strict=True):
        if kind == Kind.IO_REFUSED:
            word, what, by = "device stopped", trace.name(detail & 0xFFFF), ""
        else:
            word = decision_name(decision) if decision else "invalid"
            what, by = KIND_NAMES[kind], trace.name(detail >> 16)
        answer = errno_name(number) if number else ""
        texts = [names.setdefault(text, len(names)) for text in (what, answer, by)]
        row = (at, gpa, size, words.setdefault(word, len(words)), *texts)
        for column, value in zip(found, row, strict=True):
            column.append(value)
    return {"words": list(words), "names": list(names), "rows": found}


def _thinned(rows: Integers, most: int) -> Integers:
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, max(most, 0)).astype(np.int64)]


def ram_ranges(trace: Trace) -> list[tuple[int, int]]:
    """(gpa, bytes) of guest RAM, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for gpa, size, _ in sorted(initial_states(trace)):
        if joined and joined[-1][0] + joined[-1][1] == gpa:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((gpa, size))
    return joined
