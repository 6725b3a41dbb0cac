"""The Trace Event Format (JSON) that ui.perfetto.dev and chrome://tracing open.

One track per vCPU with its exits and, inside them, requests; one for what the policies decided;
one per device; counters for the bytes shared and deferred.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from vmm.core.output import Output, Writer
from vmm.trace.layout import COLUMNS, HOST, KIND_NAMES, Kind, decision_name
from vmm.trace.reader import Trace
from vmm.trace.states import bytes_over_time, initial_states, state_rows
from vmm.trace.summary import errno_name

_CHUNK = 1 << 16
_PROCESS = 1
_POLICIES = 999
_DEVICES = 1000
"""Thread ids: vCPUs have their own numbers, devices start here."""

Event = dict[str, Any]
Row = dict[str, int]


def write_chrome(output: Output, trace: Trace) -> None:
    """Write the whole trace, piece by piece. Raises OutputError."""
    with output.open() as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        _write(file, _process(trace))
        for event in _events(trace):
            file.write(",\n")
            _write(file, event)
        file.write("\n]}\n")


def _write(file: Writer, event: Event) -> None:
    file.write(json.dumps(event, separators=(",", ":")))


def _process(trace: Trace) -> Event:
    name = f"pyvmm {os.path.basename(os.path.normpath(trace.path))}"
    return {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": name}}


def _events(trace: Trace) -> Iterator[Event]:
    tracks: dict[int, str] = {}
    for number, row in enumerate(_rows(trace)):
        for event in _of_row(trace, number, row):
            event["pid"] = _PROCESS
            yield event
            if event["tid"] not in tracks:
                tracks[event["tid"]] = _track(trace, row, event["tid"])
    for thread, name in tracks.items():
        about = {"pid": _PROCESS, "tid": thread, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_name", **about}
    yield from _counters(trace)


def _rows(trace: Trace) -> Iterator[Row]:
    for start in range(0, trace.rows, _CHUNK):
        part = slice(start, start + _CHUNK)
        columns = {column.name: trace[column.name][part].tolist() for column in COLUMNS}
        for cells in zip(*columns.values(), strict=True):
            yield dict(zip(columns, cells, strict=True))


def _track(trace: Trace, row: Row, thread: int) -> str:
    if thread == _POLICIES:
        return "policy decisions"
    if row["kind"] in (Kind.IO_IN, Kind.IO_OUT, Kind.IO_REFUSED, Kind.LEND, Kind.RETURN):
        return trace.name(row["detail"] & 0xFFFF)
    return "host" if row["vcpu"] == HOST else f"vCPU {row['vcpu']}"


def _of_row(trace: Trace, number: int, row: Row) -> list[Event]:
    """Nothing for a change of state, which the counters show."""
    kind, name = row["kind"], trace.name(row["detail"] & 0xFFFF)
    word = KIND_NAMES.get(kind, "unknown")
    begin, span = row["time_ns"] / 1000, row["latency_ns"] / 1000
    where = {"gpa": f"{row['gpa']:#x}", "bytes": row["bytes"]}
    if kind in (Kind.SHARE, Kind.UNSHARE):
        where |= {"decision": decision_name(row["decision"]), "doorbell": name}
        if row["detail"] >> 16:
            where["by"] = trace.name(row["detail"] >> 16)
        if row["errno"]:
            where["answer"] = errno_name(row["errno"])
        decided = where["decision"] if row["decision"] else "invalid"
        by = f" ({where['by']})" if "by" in where else ""
        return [
            _complete(word, "conversion", row["vcpu"], begin, span, where),
            {
                "ph": "i", "s": "t", "cat": "policy", "name": f"{decided} {word}{by}",
                "tid": _POLICIES, "ts": begin, "args": where,
            },
        ]  # fmt: skip
    if kind == Kind.EXIT:
        address = {"address": f"{row['gpa']:#x}"}
        return [_complete(name, "exit", row["vcpu"], begin, span, address)]
    if kind == Kind.FAULT:
        return [_complete(f"fault ({name})", "fault", row["vcpu"], begin, span, where)]
    if kind in (Kind.IO_IN, Kind.IO_OUT, Kind.RETURN):
        # Requests of a queue overlap, which complete events of one track must not.
        both = {
            "cat": "io",
            "name": word if kind != Kind.RETURN else "lent",
            "id": number,
            "tid": _DEVICES + (row["detail"] & 0xFFFF),
        }
        return [
            {"ph": "b", **both, "ts": begin, "args": where},
            {"ph": "e", **both, "ts": begin + span},
        ]
    if kind == Kind.IO_REFUSED:
        thread = _DEVICES + (row["detail"] & 0xFFFF)
        return [{"ph": "i", "s": "t", "cat": "io", "name": "stopped", "tid": thread, "ts": begin}]
    return []  # also for what is lent: it is shown when it comes back


def _complete(
    name: str, category: str, thread: int, begin: float, span: float, about: dict[str, Any]
) -> Event:
    return {
        "ph": "X", "name": name, "cat": category, "tid": thread,
        "ts": begin, "dur": span, "args": about,
    }  # fmt: skip


def _counters(trace: Trace) -> Iterator[Event]:
    over_time = bytes_over_time(state_rows(trace), initial_states(trace))
    columns = (over_time.end, over_time.shared, over_time.deferred)
    for at, shared, deferred in zip(*(column.tolist() for column in columns), strict=True):
        args = {"shared": shared, "deferred": deferred}
        about = {"pid": _PROCESS, "tid": 0, "name": "bytes"}
        yield {"ph": "C", **about, "ts": at / 1000, "args": args}
