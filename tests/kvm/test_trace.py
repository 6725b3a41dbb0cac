"""A traced run of the embedded payload: the trace has what the report counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvm_bindings.x86_64 import System
from tests.support.command import run
from tests.support.trace import rows_of
from vmm.trace.layout import DECISIONS, Kind
from vmm.trace.reader import Trace

pytestmark = pytest.mark.kvm


def test_trace_of_the_payload_agrees_with_the_report(kvm: System, tmp_path: Path) -> None:
    disk, folder, report = tmp_path / "disk.img", tmp_path / "t", tmp_path / "report.json"
    disk.write_bytes(bytes(1 << 20))

    done = run(
        "--private-mem", "--disk", str(disk), "--trace", str(folder), "--report", str(report)
    )

    assert done.returncode == 0, done.stderr
    told = json.loads(report.read_text())
    for kind, name in ((Kind.SHARE, "share"), (Kind.UNSHARE, "unshare")):
        rows = rows_of(folder, kind)
        assert len(rows) == told["conversions"][name]["calls"]
        failed = [r for r in rows if r["errno"] and DECISIONS[r["decision"]] != "deny"]
        assert len(failed) == told["conversions"][name]["failed"]
        assert {r["name"] for r in rows} == {told["doorbell"]}
    assert len(rows_of(folder, Kind.EXIT)) == sum(told["exits"].values())
    assert len(rows_of(folder, Kind.IO_IN, Kind.IO_OUT)) == told["io"]["blk0"]["requests"]


def test_trace_ends_with_what_the_run_ended_with(kvm: System, tmp_path: Path) -> None:
    done = run("--private-mem", "--trace", str(tmp_path / "t"))

    assert done.returncode == 0, done.stderr
    trace = Trace(tmp_path / "t")
    assert (trace.complete, trace.torn) == (True, 0)
    assert trace.facts["guest"]["exit"] == "poweroff"
    assert trace.facts["rows"] == trace.rows
    assert [state for _, _, state in trace.facts["states"]] == ["shared", "private"]
