"""The numbers of a summary, from traces small enough to count by hand."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.support.trace import MILLISECOND, PAGE, Events
from vmm.trace.arrays import np
from vmm.trace.layout import HOST, LARGEST, NO_ANSWER, Kind
from vmm.trace.reader import Trace
from vmm.trace.summary import latencies, summarise
from vmm.trace.views.tables import tables

MIB_PAGES = 256


@pytest.fixture
def events() -> Events:
    return Events((0, 1024 * MIB_PAGES, "private"))


def summary_of(events: Events, folder: Path) -> dict[str, Any]:
    return summarise(Trace(events.write(folder / "t")))


def test_summary_counts_requests_by_what_came_of_them(events: Events, tmp_path: Path) -> None:
    events.convert(Kind.SHARE, 1, 0, 4, took=2.0)
    events.request(Kind.SHARE, 4, 8, 1, decision="deny", errno=errno.EACCES)
    events.request(Kind.SHARE, 5, 8, 2, decision="partial", errno=errno.EAGAIN)
    events.request(Kind.SHARE, 6, 8, 1, decision="none", errno=errno.EINVAL)
    events.request(Kind.SHARE, 7, 8, 1, decision="allow", errno=errno.ENOMEM)
    events.request(Kind.SHARE, 8, 8, 1, decision="kill", errno=NO_ANSWER)

    found = summary_of(events, tmp_path)["conversions"]["share"]

    assert found["requests"] == 6
    assert found["bytes"] == 4 * PAGE
    assert (found["denied"], found["partial"], found["failed"]) == (2, 1, 2)
    assert found["decisions"] == {"none": 1, "allow": 2, "deny": 1, "partial": 1, "kill": 1}
    assert found["latency_ns"]["p50"] == found["latency_ns"]["total"] == 2 * MILLISECOND


def test_summary_lists_refusals_like_with_like(events: Events, tmp_path: Path) -> None:
    number = len(events.names)
    events.names.append("Quota")
    for at in range(3):
        events.request(Kind.SHARE, at, at, 2, decision="deny", errno=errno.EACCES, high=number)
    events.request(Kind.UNSHARE, 9, 0, 1, decision="none", errno=errno.EINVAL)
    events.add(Kind.IO_REFUSED, 11, "blk0", errno=errno.EACCES, vcpu=HOST)
    events.convert(Kind.SHARE, 12, 0, 1)

    found = summary_of(events, tmp_path)["refusals"]

    assert [(r["kind"], r["from"], r["by"], r["errno"], r["count"], r["bytes"]) for r in found] == [
        ("share", "hypercall", "Quota", "EACCES", 3, 6 * PAGE),
        ("unshare", "hypercall", "", "EINVAL", 1, PAGE),
        ("io-refused", "blk0", "", "EACCES", 1, 0),
    ]
    assert found[0]["first_s"] == 0.0


def test_summary_survives_what_a_hostile_guest_asks_for(events: Events, tmp_path: Path) -> None:
    for at in range(3):
        events.add(
            Kind.SHARE, at, "port", gpa=LARGEST, size=LARGEST, errno=errno.EINVAL, took=0.001
        )

    found = summary_of(events, tmp_path)

    assert found["conversions"]["share"]["failed"] == 3
    assert found["refusals"][0]["bytes"] == pytest.approx(3 * 2**64)


def test_summary_has_io_by_device_and_direction(events: Events, tmp_path: Path) -> None:
    events.add(Kind.IO_IN, 1, "blk0", size=4097, took=1.0, vcpu=HOST)
    events.add(Kind.IO_OUT, 2, "blk0", size=528, took=3.0, vcpu=HOST)
    events.add(Kind.IO_OUT, 3, "net0", size=60, vcpu=HOST, high=1)

    found = summary_of(events, tmp_path)["io"]

    assert list(found) == ["blk0", "net0"]
    assert found["blk0"]["requests"] == 2
    assert found["blk0"]["to_guest"] == {"requests": 1, "bytes": 4097}
    assert found["blk0"]["from_guest"] == {"requests": 1, "bytes": 528}
    assert found["blk0"]["latency_ns"]["max"] == 3 * MILLISECOND


def test_summary_has_what_was_lent_by_device(events: Events, tmp_path: Path) -> None:
    for at, size in ((1, PAGE), (2, 2 * PAGE)):
        events.add(Kind.LEND, at, "blk0", gpa=PAGE, size=size, took=0.1)
    events.add(Kind.LEND, 3, "blk0", gpa=PAGE, size=PAGE, errno=errno.EACCES)
    events.add(Kind.RETURN, 1, "blk0", gpa=PAGE, size=PAGE, took=5)
    events.add(Kind.LEND, 4, "net0", gpa=PAGE, size=PAGE)

    told = summary_of(events, tmp_path)

    assert list(told["lending"]) == ["blk0", "net0"]
    blk0 = told["lending"]["blk0"]
    assert blk0["lends"] == {"requests": 2, "bytes": 3 * PAGE}
    assert (blk0["refused"], blk0["returns"]) == (1, 1)
    assert blk0["lent_ns"]["max"] == 5_000_000
    assert blk0["lent_us"] == {"8192": 1}
    assert (blk0["peak_bytes"], told["lending"]["net0"]["peak_bytes"]) == (3 * PAGE, PAGE)
    assert told["io"] == {} and told["refusals"] == []
    (table,) = [t for t in tables([told]) if t.title == "private pages lent to blk0"]
    assert ("lent for less than 8192 us", ["1"]) in [row[:2] for row in table.rows]
    (table,) = [t for t in tables([told]) if t.title == "private pages lent to net0"]
    assert [row.label for row in table.rows] == [
        "mappings", "their bytes", "lent at the same time, at most",
    ]  # fmt: skip


def test_summary_has_exits_by_reason_port_and_vcpu(events: Events, tmp_path: Path) -> None:
    for vcpu, port in ((0, 0x3F8), (1, 0x3F8), (1, 0x64)):
        events.add(Kind.EXIT, 1, "io", gpa=port, took=1.0, vcpu=vcpu)
    events.add(Kind.EXIT, 2, "wrmsr", gpa=0xC0010131, took=0.5)
    events.add(Kind.FAULT, 3, "private", gpa=0x1000, size=PAGE)

    found = summary_of(events, tmp_path)

    assert found["exits"] == {
        "io": {"count": 3, "spent_ns": 3 * MILLISECOND},
        "wrmsr": {"count": 1, "spent_ns": MILLISECOND // 2},
    }
    assert found["io_ports"] == {"0x3f8": 2, "0x64": 1}
    assert found["vcpus"] == {"0": 2, "1": 2}
    assert found["faults"] == 1


def test_summary_has_shared_bytes(events: Events, tmp_path: Path) -> None:
    events.convert(Kind.SHARE, 10, 0, 4)
    events.convert(Kind.UNSHARE, 20, 0, 3)

    found = summary_of(events, tmp_path)["memory"]

    assert found["ram_bytes"] == 1 << 30
    assert found["shared_bytes_peak"] == 4 * PAGE
    assert found["shared_peak_s"] == 0.011
    assert found["shared_bytes_last"] == PAGE
    assert found["changes"] == 2


def test_bounce_buffer_is_the_longest_area_shared_in_equal_pieces(
    events: Events, tmp_path: Path
) -> None:
    # Larger and right before it, but a single piece.
    events.convert(Kind.SHARE, 1, 80 * MIB_PAGES, 20 * MIB_PAGES)
    for piece in range(8):
        events.convert(Kind.SHARE, 2 + piece, (100 + 2 * piece) * MIB_PAGES, 2 * MIB_PAGES)
    events.convert(Kind.SHARE, 20, 900 * MIB_PAGES, 2 * MIB_PAGES)

    found = summary_of(events, tmp_path)["bounce_buffer"]

    assert found == {"gpa": 100 << 20, "bytes": 16 << 20, "pieces": 8}


def test_bounce_buffer_shared_in_one_piece_is_none(events: Events, tmp_path: Path) -> None:
    events.convert(Kind.SHARE, 1, 0, 64 * MIB_PAGES)

    assert summary_of(events, tmp_path)["bounce_buffer"] is None


def test_bounce_buffer_of_single_pages_is_none(events: Events, tmp_path: Path) -> None:
    for page in range(50):
        events.convert(Kind.SHARE, page, page, 1)

    assert summary_of(events, tmp_path)["bounce_buffer"] is None


def test_latencies_are_quantiles_of_what_was_measured() -> None:
    values = np.arange(1, 1001, dtype=np.uint64)

    found = latencies(values)

    assert (found["p50"], found["p90"], found["p99"], found["max"]) == (500, 900, 990, 1000)
    assert found["total"] == 500500
