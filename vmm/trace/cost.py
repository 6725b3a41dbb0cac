"""What conversions cost, learnt from a trace's own latencies."""

from __future__ import annotations

from typing import NamedTuple

from vmm.trace.arrays import Floats, Integers, np
from vmm.trace.layout import DECISIONS, MOST_MEMORY, Kind
from vmm.trace.reader import Trace

_ALLOW = DECISIONS.index("allow")


class Line(NamedTuple):
    """Nanoseconds: `fixed` + `per_byte` * bytes; learnt from `requests` of `sizes` lengths."""

    fixed: float
    per_byte: float
    requests: int
    sizes: int

    def cost(self, size: int) -> float:
        return self.fixed + self.per_byte * size


class CostModel(NamedTuple):
    """The guest's waiting time for a request, by what is done for it."""

    share: Line
    unshare: Line
    nothing: float
    """For a request that changes nothing, refused ones among them (ns)."""
    idle: int
    """From how many of those; 0: none was seen, and the quickest request is taken."""

    def late_discard(self, size: int) -> float:
        """What the host does later for an unshare that was put off; no guest waits for it."""
        return max(self.unshare.cost(size) - self.nothing, 0.0)


class Requests(NamedTuple):
    """A trace's requests in the order of their answers."""

    rows: Integers
    changed: Integers
    """Bytes that each brought into the other state while the guest waited."""
    late: Integers
    """Bytes of each discard that had been put off: no guest waited for those."""


def requests_of(trace: Trace) -> Requests:
    """Requests with what they changed: the state rows written since the request before."""
    kind = trace["kind"]
    wanted = np.flatnonzero((kind == Kind.STATE) | (kind == Kind.SHARE) | (kind == Kind.UNSHARE))
    is_request = kind[wanted] != Kind.STATE
    rows, states = wanted[is_request], wanted[~is_request]
    of = (np.cumsum(is_request) - is_request)[~is_request]
    # One that began before its request did is a late discard, or there is no request after it.
    own = of < len(rows)
    own[own] = trace["time_ns"][states[own]] >= trace["time_ns"][rows[of[own]]]
    late = _sizes(trace, states[~own]).astype(np.int64)
    if "deferred" in trace.names:  # put off: nothing was converted yet
        own &= (trace["detail"][states] & 0xFFFF) != trace.names.index("deferred")
    sizes = _sizes(trace, states[own]).astype(np.float64)
    changed = np.bincount(of[own], sizes, len(rows)) if len(rows) else np.empty(0)
    return Requests(rows, changed.astype(np.int64), late)


def _sizes(trace: Trace, rows: Integers) -> Integers:
    """Bytes of changes; a damaged trace may say more than there is memory."""
    return np.minimum(trace["bytes"][rows], MOST_MEMORY)


def learn(trace: Trace, requests: Requests) -> CostModel:
    """Fit the model. Of requests of equal length the median counts: outliers say little."""
    rows, changed, _ = requests
    latency = trace["latency_ns"][rows].astype(np.float64)
    plain = (trace["errno"][rows] == 0) & (trace["decision"][rows] == _ALLOW) & (changed > 0)
    kind = trace["kind"][rows]
    idle = latency[changed == 0]
    quickest = float(latency.min()) if len(latency) else 0.0
    nothing = float(np.median(idle)) if len(idle) else quickest
    share, unshare = (
        _fit(changed[plain & (kind == which)], latency[plain & (kind == which)])
        for which in (Kind.SHARE, Kind.UNSHARE)
    )
    # A direction that was never carried out costs what the other one does.
    if not share.requests:
        share = unshare
    if not unshare.requests:
        unshare = share
    return CostModel(share, unshare, nothing, len(idle))


def _fit(sizes: Integers, latency: Floats) -> Line:
    """Weighted least squares through the medians, neither part below zero."""
    if not len(sizes):
        return Line(0.0, 0.0, 0, 0)
    lengths, of = np.unique(sizes, return_inverse=True)
    medians = np.array([np.median(latency[of == index]) for index in range(len(lengths))])
    weights = np.bincount(of).astype(np.float64)
    x, y = lengths.astype(np.float64), medians
    mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
    spread = np.average((x - mean_x) ** 2, weights=weights)
    slope = np.average((x - mean_x) * (y - mean_y), weights=weights) / spread if spread else 0.0
    if slope <= 0:
        return Line(float(mean_y), 0.0, len(sizes), len(lengths))
    fixed = mean_y - slope * mean_x
    if fixed < 0:
        slope = np.average(x * y, weights=weights) / np.average(x * x, weights=weights)
        fixed = 0.0
    return Line(float(fixed), float(slope), len(sizes), len(lengths))
