"""The views of a trace: what the page, the pictures and the file for Perfetto contain."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.trace import Events
from vmm.core.errors import UsageError
from vmm.core.output import Output
from vmm.trace.layout import HOST, Kind
from vmm.trace.reader import Trace
from vmm.trace.summary import summarise
from vmm.trace.views.charts import decided_requests
from vmm.trace.views.chrome import write_chrome
from vmm.trace.views.page import page
from vmm.trace.views.plots import write_plots
from vmm.trace.views.tables import changes, tables
from vmm.trace.views.units import bytes_text, time_text


def boot_like(seed: int = 0) -> Events:
    """512 MiB, a bounce buffer, single pages back and forth, a refusal, disk I/O and exits."""
    events = Events((0, 131072, "private"))
    for piece in range(8):
        events.convert(Kind.SHARE, 10 + piece, 90000 + 512 * piece, 512, took=0.5)
    for number in range(40):
        kind = Kind.SHARE if number % 4 else Kind.UNSHARE
        events.convert(kind, 30 + number, 1000 + 7 * number + seed, 1, took=0.01 * (number + 1))
        events.add(Kind.EXIT, 30 + number, "io", gpa=0x3F8, took=0.02)
        events.add(Kind.IO_IN, 30 + number, "blk0", gpa=4096, size=4097, took=0.1, vcpu=HOST)
    events.request(Kind.SHARE, 80, 5, 1, decision="deny", errno=errno.EACCES)
    return events


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Trace]:
    with closing(Trace(boot_like().write(tmp_path / "first"))) as opened:
        yield opened


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Trace]:
    with closing(Trace(boot_like(seed=3).write(tmp_path / "second"))) as opened:
        yield opened


def test_page_asks_for_nothing_outside_itself(trace: Trace) -> None:
    made = page([trace], [summarise(trace)])

    urls = set(re.findall(r"https?://[^\s\"'<]+", made))
    assert urls == {"http://www.w3.org/2000/svg"}  # a namespace, which is never fetched
    assert not re.search(r"\b(src|href)=|@import|url\(", made)


def test_page_is_not_ended_early_by_its_data(tmp_path: Path) -> None:
    events = boot_like()
    events.facts["guest"] = {"exit": "</script><b>", "reason": "@@data@@"}
    trace = Trace(events.write(tmp_path / "t"))

    made = page([trace], [summarise(trace)])

    assert made.count("</script>") == 2
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', made, re.DOTALL)
    assert found is not None
    told = json.loads(found[1])["traces"][0]["summary"]["guest"]
    assert told == {"exit": "</script><b>", "reason": "@@data@@"}


def test_chrome_trace_has_tracks_requests_and_counters(trace: Trace, tmp_path: Path) -> None:
    write_chrome(Output("t.json", str(tmp_path / "t.json")), trace)

    events: list[dict[str, Any]] = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_phase.setdefault(event["ph"], []).append(event)
    names = {e["args"]["name"] for e in by_phase["M"] if e["name"] == "thread_name"}
    assert {"vCPU 0", "blk0"} <= names
    assert sum(e["cat"] == "conversion" for e in by_phase["X"]) == 8 + 40 + 1
    assert sum(e["cat"] == "exit" for e in by_phase["X"]) == 40
    assert len(by_phase["b"]) == len(by_phase["e"]) == 40
    assert (
        max(e["args"]["shared"] for e in by_phase["C"])
        == summarise(trace)["memory"]["shared_bytes_peak"]
    )
    refused = [e for e in by_phase["X"] if e["args"].get("answer")]
    assert [e["args"]["answer"] for e in refused] == ["EACCES"]
    assert refused[0]["ts"] == 80_000


def test_chrome_trace_has_a_track_of_policy_decisions(tmp_path: Path) -> None:
    events = boot_like()
    events.request(Kind.UNSHARE, 90, 5, 1, decision="defer", by="Late")
    events.request(Kind.SHARE, 95, 1 << 30, 1, decision="none", errno=errno.EINVAL)
    with closing(Trace(events.write(tmp_path / "t"))) as trace:
        write_chrome(Output("t.json", str(tmp_path / "t.json")), trace)

    told: list[dict[str, Any]] = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    made = [event for event in told if event.get("cat") == "policy"]
    (track,) = {event["tid"] for event in made}
    assert {"name": "policy decisions"} in [
        event["args"] for event in told if event["ph"] == "M" and event.get("tid") == track
    ]
    assert [event["name"] for event in made][-3:] == [
        "deny share", "defer unshare (Late)", "invalid share"
    ]  # fmt: skip
    assert made[-2]["ts"] == 90_000


def test_decisions_of_a_large_trace_keep_every_refusal(tmp_path: Path) -> None:
    events = Events((0, 4096, "private"))
    for number in range(300):
        events.request(Kind.SHARE, number, number, 1)
    events.request(Kind.SHARE, 150.5, 7, 1, decision="deny", errno=errno.EACCES, by="Quota")
    events.add(Kind.IO_REFUSED, 151, "blk0")
    with closing(Trace(events.write(tmp_path / "t"))) as trace:
        found = decided_requests(trace, most=50)

    times, gpas, _, words, what, answers, by = found["rows"]
    assert len(times) == 50
    at = words.index(found["words"].index("deny"))
    assert (times[at], gpas[at]) == (150_500_000, 7 * 4096)
    names = found["names"]
    assert (names[what[at]], names[answers[at]], names[by[at]]) == ("share", "EACCES", "Quota")
    stopped = words.index(found["words"].index("device stopped"))
    assert names[what[stopped]] == "blk0"


def test_changes_begin_with_words_and_end_with_the_smallest_number(
    trace: Trace, tmp_path: Path
) -> None:
    other = boot_like()
    other.facts["scheme"] = "attributes"
    for number in range(200):
        other.add(Kind.EXIT, 100 + number, "io", gpa=0x3F8, took=0.02)
    other.add(Kind.EXIT, 400, "mmio", gpa=0x1000, took=0.02)
    with closing(Trace(other.write(tmp_path / "other"))) as second:
        found = changes(tables([summarise(trace), summarise(second)]))

    labels = [row.label for row in found]
    assert labels[0] == "scheme, doorbell"
    assert labels.index("exits: mmio") < labels.index("exits: io") < labels.index("time")
    assert "trace" not in labels
    assert dict(zip(labels, found, strict=True))["exits: io"].change == "6x"


def test_runs_that_are_the_same_have_no_changes(trace: Trace, other: Trace) -> None:
    assert changes(tables([summarise(trace), summarise(other)])) == []
    assert changes(tables([summarise(trace)])) == []


def test_plots_are_pictures(trace: Trace, other: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")

    write_plots(str(tmp_path / "p"), [trace, other], [summarise(trace), summarise(other)])

    for name in ("states", "shared", "latency", "io"):
        assert (tmp_path / "p" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib_say_what_to_install(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    with pytest.raises(UsageError, match=r"pip install 'pyvmm\[plots\]'"):
        write_plots(str(tmp_path), [trace], [summarise(trace)])


def test_tables_of_two_traces_say_how_the_second_compares(tmp_path: Path) -> None:
    few, many = boot_like(), boot_like()
    for number in range(41):
        many.convert(Kind.SHARE, 100 + number, 50 * number, 1)
    traces = [Trace(few.write(tmp_path / "a")), Trace(many.write(tmp_path / "b"))]

    made = {table.title: table.rows for table in tables([summarise(t) for t in traces])}

    row = next(row for row in made["share requests"] if row.label == "requests")
    assert (row.cells, row.change) == (["39", "80"], "2.05x")


def untold() -> Events:
    """A run of a guest that shares its pages without telling the host."""
    events = Events((0, 131072, "observed"))
    for number in range(40):
        events.add(Kind.EXIT, 30 + number, "mmio", gpa=0x3F8, took=0.02)
    return events


def test_tables_of_a_run_without_news_of_shares_say_not_told_and_no_zero(tmp_path: Path) -> None:
    trace = Trace(untold().write(tmp_path / "t"))

    made = {table.title: table.rows for table in tables([summarise(trace)])}

    assert "share requests" not in made and "unshare requests" not in made
    assert [row.label for row in made["memory"]] == ["guest RAM", "shares and states"]
    assert made["memory"][1].cells == ["not told"]


def test_tables_beside_a_run_that_was_told_say_not_told(tmp_path: Path) -> None:
    both = (boot_like().write(tmp_path / "a"), untold().write(tmp_path / "b"))

    made = {table.title: table.rows for table in tables([summarise(Trace(path)) for path in both])}

    for title, label in (("share requests", "requests"), ("memory", "shared at most")):
        row = next(row for row in made[title] if row.label == label)
        assert row.cells[0] != "not told" and row.cells[1] == "not told" and not row.change


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (4096, "4 KiB"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"), (1 << 62, "4 EiB")],
)
def test_bytes_text(value: int, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0 ns"), (999, "999 ns"), (1500, "1.5 us"), (2_340_000, "2.34 ms"), (12e9, "12 s")],
)
def test_time_text(ns: float, text: str) -> None:
    assert time_text(ns) == text
