"""Traces for tests: recorded by the real recorder, read back as plain dictionaries."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vmm.trace.layout import COLUMNS, KIND_NAMES, Kind
from vmm.trace.reader import Trace
from vmm.trace.recorder import Recorder
from vmm.trace.store import TraceStore


def start_recorder(path: Path, **facts: Any) -> Recorder:
    """A recorder whose time has begun, and that flushes only when it is asked to or full."""
    recorder = Recorder(TraceStore(path), {})
    recorder.start(**facts)
    return recorder


def rows_of(path: Path, *kinds: Kind) -> list[dict[str, Any]]:
    """All events (of these kinds), by column name; the kind and the name in words."""
    trace = Trace(path)
    cells = {column.name: trace[column.name].tolist() for column in COLUMNS}
    rows: Iterable[dict[str, Any]] = (
        dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)
    )
    return [
        {**row, "kind": KIND_NAMES[row["kind"]], "name": trace.name(row["detail"] & 0xFFFF)}
        for row in rows
        if not kinds or row["kind"] in kinds
    ]


def now() -> int:
    return time.monotonic_ns()
