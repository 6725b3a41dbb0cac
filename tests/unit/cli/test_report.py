"""`pyvmm report`: what is no trace, or is damaged, is said in one line; a torn tail is left out
and said."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.support.trace import Events, start_recorder
from tests.unit.cli.conftest import Command
from vmm.trace.layout import Kind
from vmm.trace.reader import Trace
from vmm.trace.store import TraceStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trace with three events."""
    events = Events((0, 64, "private"))
    for at in range(3):
        events.add(Kind.EXIT, at, "io", gpa=0x3F8)
    return events.write(tmp_path / "t")


def rewrite_sidecar(folder: Path, **facts: object) -> None:
    sidecar = folder / "trace.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | facts))


def test_folder_that_does_not_exist_is_refused(command: Command) -> None:
    result = command("report", "nowhere")

    assert result.status == 2
    assert result.complaint == "nowhere: no such folder; give the DIR of a run with --trace DIR"


def test_file_in_the_place_of_a_folder_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    result = command("report", "file")

    assert (result.status, result.complaint[:23]) == (2, "file: is not a folder; ")


def test_folder_that_is_no_trace_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    result = command("report", "other")

    assert result.status == 2
    assert result.complaint.startswith("other is not a trace: it has no trace.json; give the DIR")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a trace: trace.json is no JSON: "),
        ("[]", "is not a trace: trace.json does not say pyvmm-trace"),
        ('{"format": "other"}', "is not a trace: trace.json does not say pyvmm-trace"),
    ],
)
def test_sidecar_that_is_something_else_is_refused(
    command: Command, folder: Path, text: str, message: str
) -> None:
    (folder / "trace.json").write_text(text)

    result = command("report", "t")

    assert (result.status, result.complaint[: len(message) + 2]) == (2, f"t {message}")


def test_trace_of_another_version_is_refused(command: Command, folder: Path) -> None:
    rewrite_sidecar(folder, version=7)

    result = command("report", "t")

    assert result.status == 2
    assert result.complaint.startswith("t is a trace of version 7; this pyvmm reads version 1: ")


@pytest.mark.parametrize("facts", [{"names": [1]}, {"names": None}, {"states": [["a", 1, 2]]}])
def test_sidecar_without_usable_facts_is_refused(
    command: Command, folder: Path, facts: dict[str, object]
) -> None:
    rewrite_sidecar(folder, **facts)

    result = command("report", "t")

    assert result.status == 2
    assert result.complaint.startswith(f"t is damaged: trace.json: {next(iter(facts))!r} is ")


def test_column_truncated_is_refused(command: Command, folder: Path) -> None:
    os.truncate(folder / "gpa" / "data.ninja", 17)

    result = command("report", "t")

    assert result.status == 2
    assert result.complaint.startswith("t is truncated: column gpa holds 2 of 3 events; copy the")


def test_column_missing_is_refused(command: Command, folder: Path) -> None:
    os.remove(folder / "errno" / "shape.ninja")

    result = command("report", "t")

    assert (result.status, result.complaint[:28]) == (2, "t is damaged: column errno: ")


def test_column_of_another_type_is_refused(command: Command, folder: Path) -> None:
    (folder / "errno" / "dtype.ninja").write_text("float64")

    result = command("report", "t")

    assert result.status == 2
    assert result.complaint == (
        "t is damaged: column errno is no array of uint16; copy the folder again, or record again"
    )


def test_torn_tail_is_left_out_and_said(command: Command, folder: Path) -> None:
    # Killed while a batch of two was being written: three columns have it, one of them counts it.
    for column, size in (("time_ns", 8), ("gpa", 8), ("bytes", 8)):
        with open(folder / column / "data.ninja", "ab") as file:
            file.write(bytes(2 * size))
    (folder / "time_ns" / "shape.ninja").write_bytes((5).to_bytes(8, "little"))
    rewrite_sidecar(folder, complete=False)

    result = command("report", "t")

    assert (Trace(folder).rows, Trace(folder).torn) == (3, 2)
    assert result.status == 0
    assert re.search(r"torn events left out +2$", result.out, re.MULTILINE)
    assert "unknown: the run did not end its trace (killed?)" in result.out


def test_run_killed_before_its_first_flush_has_no_events(command: Command, tmp_path: Path) -> None:
    TraceStore(str(tmp_path / "t")).close()

    result = command("report", "t")

    assert result.status == 0
    assert Trace(tmp_path / "t").rows == 0


def test_trace_without_events_is_reported(command: Command, tmp_path: Path) -> None:
    start_recorder(tmp_path / "t").close(complete=True)

    for options in ([], ["--json"], ["--html", "x.html"], ["--chrome", "x.json"]):
        assert command("report", "t", *options).status == 0


def test_three_traces_are_too_many(command: Command, folder: Path) -> None:
    result = command("report", "t", "t", "t")

    assert result.status == 2
    assert result.complaint == "3 traces; pyvmm report compares two at most"


@pytest.mark.parametrize("option", ["--html", "--chrome"])
def test_view_that_cannot_be_written_is_refused(
    command: Command, folder: Path, option: str
) -> None:
    result = command("report", "t", option, "nowhere/x")

    assert result.status == 2
    assert result.complaint == (
        f"{option} nowhere/x cannot be written: No such file or directory; give another path"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["t", "--html", "t/trace.json"], "--html t/trace.json is t/trace.json, which is read"),
        (["t", "--chrome", "t/gpa/data.ninja"], "--chrome t/gpa/data.ninja is in t/gpa, which"),
        (["t", "--html", "x", "--chrome", "./x"], "--html and --chrome both write x"),
    ],
)
def test_view_does_not_replace_the_trace_nor_another_view(
    command: Command, tmp_path: Path, words: list[str], message: str
) -> None:
    events = Events((0, 64, "private"))
    events.add(Kind.EXIT, 3, "io", gpa=0x3F8)
    events.write(tmp_path / "t")

    result = command("report", *words)

    assert message in result.complaint
    assert command("report", "t").status == 0
    for _ in range(2):  # beside its parts there is room, and what is there may be replaced
        assert command("report", "t", "--html", "t/page.html").status == 0
