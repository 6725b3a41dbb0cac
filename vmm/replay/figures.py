"""What a trace's requests came to, in numbers: as they were recorded, and as a replay has them.

The keys are those of `pyvmm replay --json`. Times are ns, sizes bytes; "mean" is over time.
"""

from __future__ import annotations

from typing import Any

from vmm.replay.replay import Replay, counted
from vmm.trace.arrays import np
from vmm.trace.cost import CostModel, Requests
from vmm.trace.layout import DECISIONS, NO_ANSWER, Kind
from vmm.trace.reader import Trace
from vmm.trace.states import BytesOverTime, bytes_over_time, initial_states, state_rows
from vmm.trace.summary import lent_bytes_peak

Figures = dict[str, float]


def recorded(trace: Trace, requests: Requests, model: CostModel, until: int) -> Figures:
    """What happened up to `until` (ns), in the terms of a replay. `guest_ns` and `host_ns` are by
    the model, as a replay's are; `waited_ns` is what was measured."""
    rows, changed, late = requests
    kind, answer = trace["kind"][rows], trace["errno"][rows]
    decision = trace["decision"][rows]
    over_time = bytes_over_time(state_rows(trace), initial_states(trace))
    is_share = kind == Kind.SHARE
    modelled = sum(
        line.cost(size)
        for line, way in ((model.share, is_share), (model.unshare, ~is_share))
        for size in changed[way & (changed > 0)].tolist()
    )
    return {
        "requests": len(rows),
        "denied": _count((decision == DECISIONS.index("deny")) | (answer == NO_ANSWER)),
        "partial": _count((decision == DECISIONS.index("partial")) & (answer != 0)),
        "invalid": _count(decision == 0),
        "deferred": _count(decision == DECISIONS.index("defer")),
        "joined": _count(decision == DECISIONS.index("convert")),
        "conversions": _count(changed > 0),
        "converted_bytes": int(changed.sum()),
        "late_discards": len(late),
        **_recorded_lending(trace),
        **_over_time(over_time, until),
        "guest_ns": modelled + model.nothing * _count(changed == 0),
        "host_ns": sum(map(model.late_discard, late.tolist())),
        "waited_ns": int(trace["latency_ns"][rows].sum(dtype=np.uint64)),
    }


def _recorded_lending(trace: Trace) -> Figures:
    kinds, answers = trace["kind"], trace["errno"]
    is_lend = kinds == Kind.LEND
    rows = np.flatnonzero(is_lend | (kinds == Kind.RETURN))
    return {
        "lends": _count(is_lend),
        "returns": _count(kinds == Kind.RETURN),
        "lends_refused": _count(is_lend & (answers != 0)),
        "lent_bytes_peak": lent_bytes_peak(trace, rows),
    }


def replayed(replay: Replay, until: int) -> Figures:
    """What came of a replay that has run, up to `until` (ns). `guest_ns` is how long the guest
    waited, `host_ns` what the host worked besides, both by the model."""
    over_time = bytes_over_time(replay.state_rows(), replay.initial)
    return {
        **counted(replay.decisions, replay.partial),
        "conversions": replay.conversions,
        "converted_bytes": replay.converted_bytes,
        "late_discards": replay.late_discards,
        "lends": replay.lends,
        "returns": replay.returns,
        "lends_refused": replay.lends_refused,
        "lent_bytes_peak": replay.lent_bytes_peak,
        **_over_time(over_time, until),
        "guest_ns": replay.guest_ns,
        "host_ns": replay.host_ns,
    }


def _over_time(bytes_at: BytesOverTime, until: int) -> Figures:
    return {
        "shared_bytes_peak": bytes_at.peak[0],
        "shared_bytes_mean": round(bytes_at.mean_shared(until)),
        "deferred_bytes_mean": round(bytes_at.mean_deferred(until)),
    }


def _count(which: Any) -> int:
    return int(np.count_nonzero(which))
