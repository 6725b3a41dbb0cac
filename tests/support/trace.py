"""Traces for tests: recorded by the real recorder, read back as plain dictionaries."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vmm.trace.layout import COLUMNS, DECISIONS, HOST, KIND_NAMES, ROW, Kind
from vmm.trace.reader import Trace
from vmm.trace.recorder import Recorder
from vmm.trace.store import TraceStore


def start_recorder(path: Path, **facts: Any) -> Recorder:
    """A recorder whose time has begun, and that flushes only when it is asked to or full."""
    recorder = Recorder(TraceStore(str(path)), {})
    recorder.start(**facts)
    return recorder


def rows_of(path: Path, *kinds: int) -> list[dict[str, Any]]:
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


PAGE = 4096
MILLISECOND = 1_000_000


class Events:
    """A trace written row by row, at times in milliseconds; `write` makes it a folder."""

    def __init__(self, *states: tuple[int, int, str]) -> None:
        """`states`: (first page, pages, state) when the guest started."""
        self.names = [""]
        self.rows: list[bytes] = []
        self.facts: dict[str, Any] = {
            "complete": True,
            "scheme": "cbit",
            "doorbell": "hypercall",
            "guest": {"exit": "poweroff", "reason": ""},
            "states": [[first * PAGE, pages * PAGE, state] for first, pages, state in states],
        }

    def add(
        self,
        kind: int,
        at: float,
        name: str = "",
        *,
        gpa: int = 0,
        size: int = 0,
        took: float = 0.0,
        errno: int = 0,
        vcpu: int = 0,
        decision: str = "none",
        high: int = 0,
        by: str = "",
    ) -> None:
        """`high`, or the number of the name `by`, is the detail's upper half."""
        for each in filter(None, (name, by)):
            if each not in self.names:
                self.names.append(each)
        high = high or self.names.index(by)
        self.rows.append(
            ROW.pack(
                round(at * MILLISECOND), gpa, size, round(took * MILLISECOND),
                self.names.index(name) | high << 16, errno, vcpu, kind, DECISIONS.index(decision),
            )
        )  # fmt: skip

    def request(self, kind: int, at: float, first: int, pages: int, **about: Any) -> None:
        """A share or an unshare of pages; allowed unless it is said otherwise."""
        about.setdefault("decision", "allow")
        self.add(kind, at, "hypercall", gpa=first * PAGE, size=pages * PAGE, **about)

    def state(self, at: float, first: int, pages: int, state: str, took: float = 0.0) -> None:
        gpa, size = first * PAGE, pages * PAGE
        self.add(Kind.STATE, at, state, took=took, vcpu=HOST, gpa=gpa, size=size)

    def convert(self, kind: int, at: float, first: int, pages: int, took: float = 1.0) -> None:
        """A request that is carried out."""
        self.state(at, first, pages, "shared" if kind == Kind.SHARE else "private", took)
        self.request(kind, at, first, pages, took=took)

    def write(self, folder: Path) -> Path:
        store = TraceStore(str(folder))
        store.append(memoryview(b"".join(self.rows)), len(self.rows))
        store.write_sidecar({**self.facts, "names": self.names})
        store.close()
        return folder


def now() -> int:
    return time.monotonic_ns()
