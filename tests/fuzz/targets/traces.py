"""Traces that anybody may have made: what `pyvmm report` and `pyvmm replay` do with them."""

from __future__ import annotations

import io
import json
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

from tests.fuzz.targets.registry import scratch_folder, target
from tests.support.trace import Events
from vmm.cli.report import plain_lines
from vmm.core.errors import UsageError
from vmm.core.output import Output
from vmm.policy import Policy
from vmm.policy.builtin import Coalesce, DeferredDiscard, Quota
from vmm.replay.figures import recorded, replayed
from vmm.replay.replay import Replay
from vmm.scenario.recording import of_trace, parse
from vmm.selftest.from_trace import case_of, cell_of
from vmm.trace.cost import learn, requests_of
from vmm.trace.layout import COLUMNS, FORMAT, HOST, ROW, SIDECAR, VERSION, Kind
from vmm.trace.reader import Trace
from vmm.trace.summary import duration_ns, summarise
from vmm.trace.views.chrome import write_chrome
from vmm.trace.views.page import page

_MOST_ROWS = 24
_HEAD = struct.Struct("<HBB")
_MOST_CALLS = 600_000
"""Of functions: a page with all its charts is some 100,000."""
_SCRIPTS = 2
"""In a page: its data and its program; a third would be the trace's."""


def _packed(events: Events, damage: int = 0) -> bytes:
    facts = {"format": FORMAT, "version": VERSION, **events.facts, "names": events.names}
    sidecar = json.dumps(facts, separators=(",", ":")).encode()
    return _HEAD.pack(len(sidecar), damage, 0) + sidecar + b"".join(events.rows)


def _traces() -> Iterator[bytes]:
    some = Events((0, 8, "shared"), (8, 56, "private"))
    some.convert(Kind.SHARE, 1, 32, 4)
    some.convert(Kind.UNSHARE, 2, 32, 2)
    some.request(Kind.SHARE, 3, 60, 9, errno=22, decision="none")
    some.request(Kind.SHARE, 4, 40, 1, errno=1, decision="deny", by="Quota")
    some.add(Kind.IO_IN, 5, "blk0", gpa=4096, size=512, high=1)
    some.add(Kind.IO_OUT, 6, "net0", gpa=8192, size=60)
    some.add(Kind.IO_REFUSED, 7, "blk0", gpa=1 << 40, errno=14)
    some.add(Kind.EXIT, 8, "io", gpa=0x3F8, took=0.1)
    some.add(Kind.FAULT, 9, "private", gpa=4096, size=4096)
    some.add(Kind.LEND, 10, "blk0", gpa=0x10000, size=8192, by="read and write")
    some.add(Kind.RETURN, 11, "blk0", gpa=0x10000, size=8192, took=1.0, vcpu=HOST)
    late = Events((0, 64, "private"))
    late.state(1, 0, 4, "deferred")
    late.request(Kind.UNSHARE, 1, 0, 4, decision="defer")
    late.state(20, 0, 4, "private")
    empty = Events()
    odd = Events((0, 2, "shared"), (1024, 2, "weird"))
    odd.facts |= {"complete": False, "scheme": "pkvm", "guest": {"exit": "panic"}, "cpus": 4}
    for events in (some, late, empty, odd):
        yield _packed(events)
    yield _packed(some, 1)
    yield _packed(some, 7)


def _lay_out(data: bytes, folder: Path) -> None:
    """The sidecar and a file for each column; a damaged one is short, or says that it is more."""
    size, damage, which = _HEAD.unpack(data[: _HEAD.size].ljust(_HEAD.size, b"\0"))
    rest = data[_HEAD.size :]
    (folder / SIDECAR).write_bytes(rest[:size])
    raw = rest[size:][: ROW.size * _MOST_ROWS]
    rows = list(ROW.iter_unpack(raw[: len(raw) - len(raw) % ROW.size]))
    for number, column in enumerate(COLUMNS):
        inside = folder / column.name
        inside.mkdir()
        count = len(rows)
        cells = b"".join(struct.pack(f"<{column.code}", row[number]) for row in rows)
        if number == which % len(COLUMNS):
            if damage & 1:
                cells = cells[:-1]
            if damage & 2:
                count += 1 + damage
            if damage & 4:
                (inside / "order.ninja").write_bytes(b"F")
        for name, text in (("type", b"numpy"), ("dtype", column.dtype.encode()), ("order", b"C")):
            path = inside / f"{name}.ninja"
            if not path.exists():
                path.write_bytes(text)
        (inside / "shape.ninja").write_bytes(struct.pack("<Q", count))
        (inside / "data.ninja").write_bytes(cells)


class _Timeline:
    """What is written to in an Output's place."""

    def __init__(self) -> None:
        self.text = io.StringIO()

    @contextmanager
    def open(self) -> Iterator[io.StringIO]:
        yield self.text


@target("trace", lambda: list(_traces()), longest=2048, runs=30, most_calls=_MOST_CALLS)
def trace(data: bytes) -> None:
    """The sidecar's length, which column is damaged and how, the sidecar, rows of 48 bytes: a line
    about what is wrong, or a report, a page, a timeline, a recording and a test case of it."""
    with scratch_folder() as name, warnings.catch_warnings():
        warnings.simplefilter("error")
        _lay_out(data, Path(name))
        try:
            opened = Trace(name)
        except UsageError as error:
            assert str(error)
            return
        with closing(opened) as read:
            assert read.rows <= _MOST_ROWS
            summary = summarise(read)
            json.dumps(summary, allow_nan=False)
            lines = plain_lines([summary])
            assert all(line.isprintable() for line in lines)
            assert page([read], [summary]).count("</script") == _SCRIPTS
            timeline = _Timeline()
            write_chrome(cast(Output, timeline), read)
            json.loads(timeline.text.getvalue())
            for make in (cell_of, case_of):
                try:
                    make(read)
                except UsageError as error:
                    assert str(error)
            try:
                found = of_trace(read, {})
            except UsageError:
                return
            parse(found.dump(), "again")


_POLICIES: tuple[Callable[[], Sequence[Policy]], ...] = (
    list,
    lambda: [Quota(8 << 12)],
    lambda: [DeferredDiscard()],
    lambda: [Coalesce()],
)


def _replays() -> list[bytes]:
    return [bytes([number]) + data for data in _traces() for number in range(len(_POLICIES))]


@target("replay", _replays, longest=2048, runs=30)
def replay(data: bytes) -> None:
    """A policy's number, then a trace: what is replayed adds up, and memory is all there."""
    policies: Sequence[Policy] = _POLICIES[(data[0] if data else 0) % len(_POLICIES)]()
    with scratch_folder() as name, warnings.catch_warnings():
        warnings.simplefilter("error")
        _lay_out(data[1:], Path(name))
        try:
            opened = Trace(name)
        except UsageError:
            return
        with closing(opened) as read:
            requests = requests_of(read)
            model = learn(read, requests)
            until = duration_ns(read)
            json.dumps(recorded(read, requests, model, until), allow_nan=False)
            try:
                made = Replay(read, requests, policies)
            except UsageError as error:
                assert str(error)
                return
            with closing(made):
                made.run(model, until)
                figures = replayed(made, until)
                json.dumps(figures, allow_nan=False)
                if made.ended is None:
                    assert figures["requests"] == len(requests.rows)
                assert figures["denied"] + figures["partial"] <= made.refused_requests
                memory = made._memory
                assert sum(area.size for area, _ in memory.states()) == memory.ram_bytes
