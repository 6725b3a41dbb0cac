"""What a trace says, in numbers: JSON-ready, and the source of every view."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Any

from vmm.trace.arrays import Booleans, Integers, np
from vmm.trace.layout import (
    DECISIONS,
    HOST,
    KIND_NAMES,
    MOST_MEMORY,
    NO_ANSWER,
    Kind,
    decision_name,
)
from vmm.trace.reader import Trace
from vmm.trace.states import BytesOverTime, bytes_over_time, initial_states, is_told, state_rows

_CHUNK = 1 << 20
_PORT_EXIT = "io"
_PORTS = 1 << 16
_MOST_PORTS = 12
MOST_DEVICES, MOST_REASONS, MOST_REFUSALS = 64, 256, 1000
"""How many are told of: more than any guest has, and few enough for whatever a file says."""
_DENY, _PARTIAL, _NONE = (DECISIONS.index(word) for word in ("deny", "partial", "none"))
_LENDING = (Kind.LEND, Kind.RETURN)
_IO_KINDS = (Kind.IO_IN, Kind.IO_OUT, Kind.IO_REFUSED)


def summarise(trace: Trace) -> dict[str, Any]:
    """Everything that the report shows; times in ns or, where named `_s`, in seconds.

    Columns are looked at one by one, so that a large trace stays on disk.
    """
    kinds = trace["kind"]
    seconds = duration_ns(trace) / 1e9
    over_time = bytes_over_time(state_rows(trace), initial_states(trace))
    return {
        "path": str(trace.path),
        "complete": trace.complete,
        "torn_events": trace.torn,
        "dropped_events": trace.facts.get("dropped_events", 0),
        "events": trace.rows,
        "seconds": round(seconds, 6),
        "guest": trace.facts.get("guest"),
        "run": {
            name: trace.facts.get(name)
            for name in ("command", "kernel", "cpus", "scheme", "doorbell", "backings", "policies")
        },
        "conversions": {
            KIND_NAMES[kind]: _requests(trace, np.flatnonzero(kinds == kind))
            for kind in (Kind.SHARE, Kind.UNSHARE)
        },
        "refusals": refusals(trace),
        "memory": _memory(trace, over_time),
        "bounce_buffer": bounce_buffer(trace),
        "faults": int(np.count_nonzero(kinds == Kind.FAULT)),
        "io": _devices(trace),
        "lending": _lending(trace),
        **_exits(trace),
    }


def duration_ns(trace: Trace) -> int:
    """From the guest's start to the end of the last event."""
    last = 0
    for start in range(0, trace.rows, _CHUNK):
        part = slice(start, start + _CHUNK)
        last = max(last, int((trace["time_ns"][part] + trace["latency_ns"][part]).max()))
    return last


def latencies(values: Integers) -> dict[str, int]:
    """Quantiles of latencies in ns."""
    if not len(values):
        return {"p50": 0, "p90": 0, "p99": 0, "max": 0, "total": 0}
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99), method="inverted_cdf")
    most, total = int(values.max()), int(values.sum(dtype=np.uint64))
    return {"p50": int(p50), "p90": int(p90), "p99": int(p99), "max": most, "total": total}


def _requests(trace: Trace, rows: Integers) -> dict[str, Any]:
    """One direction: what was asked, and what came of it."""
    answer, decision = trace["errno"][rows], trace["decision"][rows]
    done = answer == 0
    denied = ~done & ((decision == _DENY) | (answer == NO_ANSWER))
    partial = ~done & (decision == _PARTIAL)
    decided = np.bincount(decision, minlength=len(DECISIONS))
    return {
        "requests": len(rows),
        "bytes": int(trace["bytes"][rows][done].sum(dtype=np.uint64)),
        "denied": int(np.count_nonzero(denied)),
        "partial": int(np.count_nonzero(partial)),
        "failed": int(np.count_nonzero(~done & ~denied & ~partial)),
        "decisions": {
            word: int(count) for word, count in zip(DECISIONS, decided, strict=False) if count
        },
        "latency_ns": latencies(trace["latency_ns"][rows][done]),
    }


def refusals(trace: Trace) -> list[dict[str, Any]]:
    """Requests and I/O that were refused or failed, like with like, the most frequent first."""
    rows = np.flatnonzero(
        (trace["errno"] != 0) & np.isin(trace["kind"], (Kind.SHARE, Kind.UNSHARE, Kind.IO_REFUSED))
    )
    # All that makes two alike, as one number, which sorts far quicker than four.
    key = trace["kind"][rows].astype(np.uint64) << np.uint64(56)
    for name, shift in (("decision", 48), ("errno", 32), ("detail", 0)):
        key |= trace[name][rows].astype(np.uint64) << np.uint64(shift)
    keys, first, inverse, counts = np.unique(
        key, return_index=True, return_inverse=True, return_counts=True
    )
    sizes = np.bincount(inverse.ravel(), trace["bytes"][rows], len(keys))
    result = []
    for index in np.argsort(-counts, kind="stable")[:MOST_REFUSALS]:
        number = int(keys[index])
        kind, detail, answer = number >> 56, number & 0xFFFFFFFF, number >> 32 & 0xFFFF
        result.append(
            {
                "kind": KIND_NAMES[kind],
                "from": trace.name(detail & 0xFFFF),
                "decision": decision_name(number >> 48 & 0xFF),
                "by": trace.name(detail >> 16) if kind != Kind.IO_REFUSED else "",
                "errno": errno_name(answer),
                "count": int(counts[index]),
                "bytes": int(sizes[index]),
                "first_s": round(int(trace["time_ns"][rows[first[index]]]) / 1e9, 6),
            }
        )
    return result


def errno_name(number: int) -> str:
    """EACCES and the like; what the guest got."""
    return "no answer" if number == NO_ANSWER else errno.errorcode.get(number, f"errno {number}")


def _memory(trace: Trace, over_time: BytesOverTime) -> dict[str, Any]:
    """RAM, and how much of it was shared when: None where the host was not told."""
    peak, at = over_time.peak
    ram_bytes = sum(size for _, size, _ in initial_states(trace))
    shared = {
        "changes": len(over_time.end) - 1,
        "shared_bytes_first": int(over_time.shared[0]),
        "shared_bytes_last": int(over_time.shared[-1]),
        "shared_bytes_peak": peak,
        "shared_peak_s": round(at / 1e9, 6),
        "shared_bytes_mean": round(over_time.mean_shared(duration_ns(trace))),
        "deferred_bytes_peak": int(over_time.deferred.max()),
    }
    told = is_told(trace)
    return {
        "ram_bytes": ram_bytes,
        "told": told,
        **(shared if told else dict.fromkeys(shared)),
    }


def bounce_buffer(trace: Trace) -> dict[str, int] | None:
    """Where the guest's swiotlb seems to be: the longest area shared in two or more neighbouring
    pieces of equal size, at least 4 MiB in all. A guess from how Linux asks (2 MiB at a time)."""
    kind, answer, size = trace["kind"], trace["errno"], trace["bytes"]
    rows = np.flatnonzero((kind == Kind.SHARE) & (answer == 0) & (size >= 1 << 18))
    if not len(rows):
        return None
    gpa, length = trace["gpa"][rows], size[rows]
    # A run ends where the next piece isn't the neighbour, or has another size.
    breaks = (gpa[1:] != gpa[:-1] + length[:-1]) | (length[1:] != length[:-1])
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    pieces = np.diff(np.append(starts, len(rows)))
    totals = np.where(pieces > 1, pieces * length[starts].astype(np.int64), 0)
    longest = int(np.argmax(totals))
    if totals[longest] < 4 << 20:
        return None
    return {
        "gpa": int(gpa[starts[longest]]),
        "bytes": int(totals[longest]),
        "pieces": int(pieces[longest]),
    }


def _devices(trace: Trace) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for name, mine in rows_by_device(trace, _IO_KINDS):
        kinds, sizes = trace["kind"][mine], trace["bytes"][mine]
        served = kinds != Kind.IO_REFUSED
        result[name] = {
            "requests": int(np.count_nonzero(served)),
            "to_guest": _moved(kinds == Kind.IO_IN, sizes),
            "from_guest": _moved(kinds == Kind.IO_OUT, sizes),
            "stopped": int(np.count_nonzero(~served)),
            "latency_ns": latencies(trace["latency_ns"][mine][served]),
        }
    return result


def lent_bytes_peak(trace: Trace, rows: Integers) -> int:
    """How much was lent at the same time, at most, of these rows of lending, in their order; pages
    of two mappings count twice."""
    # No guest has memory beyond, whatever a damaged trace says.
    sizes = np.minimum(trace["bytes"][rows], MOST_MEMORY).astype(np.float64)
    back = trace["kind"][rows] == Kind.RETURN
    change = np.where(back, -sizes, np.where(trace["errno"][rows] == 0, sizes, 0))
    return max(int(np.cumsum(change).max(initial=0)), 0)


def _times(nanoseconds: Integers) -> dict[str, int]:
    """How many were shorter than so many microseconds (powers of two), and no less than half as
    long: LendingCounts.lent_us."""
    microseconds = nanoseconds // 1000
    limits, counts = np.unique(
        np.where(microseconds == 0, 0, np.frexp(microseconds.astype(np.float64))[1]),
        return_counts=True,
    )
    found = zip(limits.tolist(), counts.tolist(), strict=True)
    return {str(1 << limit): count for limit, count in found}


def _lending(trace: Trace) -> dict[str, dict[str, Any]]:
    """What was lent to each device; nothing where the guest has no IOMMU."""
    result: dict[str, dict[str, Any]] = {}
    for name, mine in rows_by_device(trace, _LENDING):
        kinds, answers = trace["kind"][mine], trace["errno"][mine]
        lends = kinds == Kind.LEND
        back = ~lends
        result[name] = {
            "lends": _moved(lends & (answers == 0), trace["bytes"][mine]),
            "refused": int(np.count_nonzero(lends & (answers != 0))),
            "returns": int(np.count_nonzero(back)),
            "peak_bytes": lent_bytes_peak(trace, mine),
            "lent_us": _times(trace["latency_ns"][mine][back]),
            "lent_ns": latencies(trace["latency_ns"][mine][back]),
        }
    return result


def rows_by_device(trace: Trace, kinds: Sequence[int]) -> Iterator[tuple[str, Integers]]:
    """Each device's name and rows of these kinds; of more than MOST_DEVICES the busiest."""
    rows = np.flatnonzero(np.isin(trace["kind"], kinds))
    numbers = (trace["detail"][rows] & 0xFFFF).astype(np.uint16)
    counts = np.bincount(numbers, minlength=1 << 16)
    for number in np.sort(np.argsort(-counts, kind="stable")[:MOST_DEVICES]).tolist():
        if counts[number]:
            yield trace.name(number), rows[numbers == number]


def _moved(which: Booleans, sizes: Integers) -> dict[str, int]:
    return {
        "requests": int(np.count_nonzero(which)),
        "bytes": int(sizes[which].sum(dtype=np.uint64)),
    }


def _exits(trace: Trace) -> dict[str, Any]:
    """Exits by reason with the time that user space took, by port, and by vCPU."""
    counts, ports = np.zeros(1 << 16, np.int64), np.zeros(_PORTS, np.int64)
    spent, by_vcpu = np.zeros(1 << 16), np.zeros(HOST + 1, np.int64)
    port_exit = trace.names.index(_PORT_EXIT) if _PORT_EXIT in trace.names else -1
    for start in range(0, trace.rows, _CHUNK):
        part = slice(start, start + _CHUNK)
        rows = np.flatnonzero(trace["kind"][part] == Kind.EXIT)
        reason = trace["detail"][part][rows] & 0xFFFF
        counts += np.bincount(reason, minlength=len(counts))
        spent += np.bincount(reason, trace["latency_ns"][part][rows], minlength=len(spent))
        by_vcpu += np.bincount(trace["vcpu"][part][rows], minlength=len(by_vcpu))
        port = trace["gpa"][part][rows][reason == port_exit]
        ports += np.bincount(port[port < _PORTS].astype(np.int64), minlength=_PORTS)
    busy = np.argsort(-counts, kind="stable")[:MOST_REASONS]
    reasons = [int(number) for number in busy if counts[number]]
    busiest = [int(port) for port in np.argsort(-ports, kind="stable")[:_MOST_PORTS]]
    return {
        "exits": {
            trace.name(number): {"count": int(counts[number]), "spent_ns": int(spent[number])}
            for number in reasons
        },
        "io_ports": {f"{port:#x}": int(ports[port]) for port in busiest if ports[port]},
        "vcpus": {str(int(vcpu)): int(by_vcpu[vcpu]) for vcpu in np.flatnonzero(by_vcpu)},
    }
