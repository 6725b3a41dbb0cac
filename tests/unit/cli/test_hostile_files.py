"""Files that somebody else made: whatever they are, one line says so, in bounded time and memory.

The command is a process of its own with 4 GB of address space, so that a test can fail: what
waits for ever, or takes all memory, would take the tests with it.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.trace import PAGE, Events
from vmm.trace.layout import COLUMNS, MOST_ROWS, Kind

ROOT = Path(__file__).resolve().parents[3]
KIB_OF_ADDRESSES = 4_000_000
SECONDS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trace with a few events of every kind."""
    events = Events((0, 64, "private"))
    events.convert(Kind.SHARE, 1, 0, 4)
    events.request(Kind.UNSHARE, 2, 0, 4, errno=13, decision="deny")
    events.add(Kind.EXIT, 3, "io", gpa=0x3F8)
    events.add(Kind.IO_IN, 4, "disk0", gpa=0, size=512)
    return events.write(tmp_path / "t")


def pyvmm(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    limited = f'ulimit -v {KIB_OF_ADDRESSES}; exec "$@"'
    return subprocess.run(
        ["sh", "-c", limited, "sh", sys.executable, "-m", "vmm", *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def refused(tmp_path: Path, message: str, *arguments: str) -> None:
    """Status 2 and one line, which has `message` in it."""
    result = pyvmm(tmp_path, *arguments)

    assert len(result.stderr.splitlines()) == 1, result.stderr[-2000:]
    assert message in result.stderr
    assert "\x1b" not in result.stderr
    assert result.stdout == ""
    assert result.returncode == 2


def rewrite(folder: Path, facts: dict[str, Any]) -> None:
    sidecar = folder / "trace.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | facts))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"states": [[0, 1 << 62, "shared"]]}, "0x4000000000000000 bytes ('shared') is not of"),
        ({"states": [[0, 1 << 80, "shared"]]}, "more than 0x1"),
        ({"states": [[0, 1 << 43, "shared"]]}, "0x80000000000 bytes"),
        ({"states": [[0, -5, "shared"]]}, "of -0x5 bytes"),
        ({"states": [[7, PAGE, "shared"]]}, "the memory at 0x7 of"),
        ({"states": [[0, 2 * PAGE, "shared"], [PAGE, PAGE, "private"]]}, "each named once"),
        ({"states": [[0, 1.5, "shared"]]}, "'states' is [[0, 1.5, 'shared']], not a list of ["),
        ({"states": [[True, PAGE, "shared"]]}, "'states' is"),
        ({"names": ["x"] * 70_000}, "'names' is ['x', 'x', "),
        ({"names": {"a": 1}}, "'names' is {'a': 1}, not a list of at most 65536 texts"),
        ({"complete": 1}, "'complete' is 1, not true or false"),
        ({"guest": 5}, "'guest' is 5, not texts by name"),
        ({"guest": {"exit": 5}}, "'guest' is {'exit': 5}"),
        ({"policies": 7}, "'policies' is 7, not a list of lists of texts"),
        ({"command": {}}, "'command' is {}"),
        ({"backings": "x"}, "'backings' is 'x'"),
        ({"scheme": ["\x1b]0;owned\x07"]}, "'scheme' is ['\\x1b]0;owned\\x07']"),
        ({"version": [1] * 1000}, "is a trace of version [1, 1, 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_sidecar_with_wrong_facts_is_refused(
    tmp_path: Path, folder: Path, facts: dict[str, Any], message: str
) -> None:
    rewrite(folder, facts)

    refused(tmp_path, message, "report", "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "trace.json is nested more than 32 deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "trace.json is nested more than 32 deep"),
        (" " * (9 << 20), "trace.json has 9437184 bytes, 8388608 at most are read; give the DIR"),
        ('{"a": NaN}', "trace.json is no JSON: NaN is no number in JSON"),
        ('{"a": ' + "9" * 5000 + "}", "trace.json is no JSON: "),
        ("\udcff", "trace.json is no JSON: "),
    ],
    ids=["deep", "rather deep", "large", "nan", "long number", "no text"],
)
def test_sidecar_that_is_no_bounded_json_is_refused(
    tmp_path: Path, folder: Path, text: str, message: str
) -> None:
    (folder / "trace.json").write_bytes(text.encode("utf-8", "surrogateescape"))

    refused(tmp_path, message, "report", "t")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS: list[tuple[Callable[[Path], None], str]] = [
    (fifo, "is a FIFO, not a regular file"),
    (zeros, "is a symbolic link, not a regular file"),
    (Path.mkdir, "is a directory, not a regular file"),
]
COLUMN_FILES = ("shape", "dtype", "order", "type", "data")
FILES = ["trace.json", *(f"gpa/{name}.ninja" for name in COLUMN_FILES)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("put", "message"), KINDS, ids=["fifo", "zero", "folder"])
def test_trace_file_that_is_no_regular_file_is_refused(
    tmp_path: Path, folder: Path, name: str, put: Callable[[Path], None], message: str
) -> None:
    (folder / name).unlink()
    put(folder / name)

    refused(tmp_path, message, "replay" if name.endswith("data.ninja") else "report", "t")


def test_column_that_is_a_link_is_refused(tmp_path: Path, folder: Path) -> None:
    (folder / "gpa").rename(tmp_path / "elsewhere")
    (folder / "gpa").symlink_to(tmp_path / "elsewhere")

    refused(tmp_path, "t is damaged: column gpa: Not a directory", "report", "t")


def set_rows(folder: Path, rows: int, shape: int | None = None) -> None:
    """Sparse columns of that many rows, which take no room on the disk."""
    for column in COLUMNS:
        os.truncate(folder / column.name / "data.ninja", rows * column.size)
        packed = struct.pack("<Q", rows if shape is None else shape)
        (folder / column.name / "shape.ninja").write_bytes(packed)


@pytest.mark.parametrize("shape", [60_000_000, (1 << 64) - 1])
def test_sparse_trace_of_too_many_events_is_refused(
    tmp_path: Path, folder: Path, shape: int
) -> None:
    set_rows(folder, 60_000_000, shape)

    refused(tmp_path, f"has {shape} events; {MOST_ROWS} at most are recorded", "report", "t")


def test_column_that_is_larger_than_any_is_refused(tmp_path: Path, folder: Path) -> None:
    os.truncate(folder / "gpa" / "data.ninja", 1 << 42)

    refused(tmp_path, "data.ninja has 4398046511104 bytes, 134742016 at most", "report", "t")


def test_time_beyond_all_is_refused(tmp_path: Path, folder: Path) -> None:
    (folder / "time_ns" / "data.ninja").write_bytes(struct.pack("<5Q", 1, 2, (1 << 64) - 1, 3, 4))

    refused(tmp_path, "time_ns of event 2 is 18446744073709551615, more than", "report", "t")


def test_row_of_nonsense_is_shown_as_numbers(tmp_path: Path, folder: Path) -> None:
    (folder / "decision" / "data.ninja").write_bytes(bytes([200]) * 5)
    (folder / "detail" / "data.ninja").write_bytes(b"\xff" * 20)
    (folder / "gpa" / "data.ninja").write_bytes(b"\xff" * 40)
    (folder / "bytes" / "data.ninja").write_bytes(b"\xff" * 40)

    for options in ([], ["--json"], ["--html", "x.html"], ["--chrome", "x.json"]):
        result = pyvmm(tmp_path, "report", "t", *options)
        assert (result.returncode, result.stderr) == (0, "")


def test_changes_that_cover_more_than_can_be_followed_are_refused(tmp_path: Path) -> None:
    events = Events((0, 1 << 26, "private"))
    for at in range(300):
        events.state(at, 0, 1 << 26, "shared")
    events.write(tmp_path / "t")

    refused(tmp_path, "changes of page states cover 20132659200 pages in all", "report", "t")


def test_terminal_sequence_in_a_name_is_not_printed(tmp_path: Path, folder: Path) -> None:
    rewrite(folder, {"scheme": "\x1b]0;owned\x07\x1b[31m", "doorbell": "\udcff"})

    for options in ([], ["--json"], ["--html", "x.html"]):
        result = pyvmm(tmp_path, "report", "t", *options)
        assert "\x1b" not in result.stdout
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("put", "message"), KINDS, ids=["fifo", "zero", "folder"])
def test_results_that_are_no_regular_file_are_refused(
    tmp_path: Path, put: Callable[[Path], None], message: str
) -> None:
    put(tmp_path / "r")
    message = message.replace("a symbolic link", "a device")

    refused(tmp_path, f"--compare r {message}", "bench", "--compare", "r", "r")


@pytest.mark.parametrize(("put", "message"), KINDS, ids=["fifo", "zero", "folder"])
def test_policy_that_is_no_regular_file_is_refused(
    tmp_path: Path, put: Callable[[Path], None], message: str
) -> None:
    put(tmp_path / "p.py")
    message = message.replace("a symbolic link", "a device")

    refused(tmp_path, f"loading p.py failed: it {message}", "--private-mem", "--policy", "p.py:P")
