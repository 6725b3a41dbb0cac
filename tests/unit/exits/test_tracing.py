"""What the trace has of exits."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm_bindings.exits import IoExit, MemoryFaultExit, WrmsrExit
from tests.support.fake_vcpu import FakeVcpu, RecordingDevice, Rig
from tests.support.trace import rows_of, start_recorder
from vmm.exits.tracing import traced


def test_exit_traced_is_handled_as_ever_and_written_down(rig: Rig, tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")
    device = RecordingDevice()
    rig.ports.add(0x3F8, 8, device)
    rig.handlers.table = traced(rig.handlers.table, recorder)

    rig.handle(IoExit(0x3F9, 1, 1, True, b"x"), FakeVcpu(index=2))
    rig.handle(WrmsrExit(0xC001_0131, 1, 0))
    recorder.close()

    assert device.writes == [(1, 1, ord("x"))]
    rows = [(r["kind"], r["name"], r["vcpu"], r["gpa"]) for r in rows_of(tmp_path / "t")]
    assert rows == [("exit", "io", 2, 0x3F9), ("exit", "wrmsr", 0, 0xC001_0131)]


def test_fault_traced_says_which_side_and_where(rig: Rig, tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")
    rig.handlers.table = traced(rig.handlers.table, recorder)

    rig.handle(MemoryFaultExit(8, 0x8_0000, 0x2000, 14))
    recorder.close()

    fault, exit = rows_of(tmp_path / "t")
    assert (fault["kind"], fault["name"], fault["gpa"], fault["bytes"]) == (
        "fault", "private", 0x8_0000, 0x2000,
    )  # fmt: skip
    assert (exit["kind"], exit["name"]) == ("exit", "memory_fault")


def test_exit_whose_handler_raises_is_written_down_all_the_same(rig: Rig, tmp_path: Path) -> None:
    recorder = start_recorder(tmp_path / "t")

    def broken(vcpu: object, exit: object) -> None:
        raise RuntimeError("broken")

    rig.handlers.table[IoExit] = ("io", broken)
    rig.handlers.table = traced(rig.handlers.table, recorder)

    with pytest.raises(RuntimeError, match="broken"):
        rig.handle(IoExit(0x80, 1, 1, True, b"x"))
    recorder.close()

    assert [row["name"] for row in rows_of(tmp_path / "t")] == ["io"]
