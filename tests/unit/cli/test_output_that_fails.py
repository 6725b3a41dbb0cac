"""Output that can't be written: one line, status 1 (not 3, which is about the host's KVM), and
what was there stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trace import Events
from vmm.cli.main import _explain
from vmm.trace.layout import Kind

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    events = Events((0, 64, "private"))
    events.add(Kind.EXIT, 3, "io", gpa=0x3F8)
    return events.write(tmp_path / "t")


def shell(tmp_path: Path, words: str) -> subprocess.CompletedProcess[str]:
    """A line of sh, in which pyvmm is the command."""
    script = f'pyvmm() {{ "{sys.executable}" -m vmm "$@"; }}; {words}'
    return subprocess.run(
        ["sh", "-c", script], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("option", ["--html", "--chrome"])
def test_full_device_is_named(tmp_path: Path, option: str) -> None:
    result = shell(tmp_path, f"pyvmm report t {option} /dev/full")

    assert result.stderr == (
        f"pyvmm: {option} /dev/full could not be written: No space left on device; make room, or "
        "give a path on another file system\n"
    )
    assert result.returncode == 1


@pytest.mark.usefixtures("folder")
def test_page_that_does_not_fit_leaves_the_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("the earlier one")

    result = shell(tmp_path, "ulimit -f 1; pyvmm report t --html page")

    assert "--html page could not be written: File too large" in result.stderr
    assert result.returncode == 1
    assert (tmp_path / "page").read_text() == "the earlier one"
    assert sorted(os.listdir(tmp_path)) == ["page", "t"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "words", ["report t", "report t --json", "replay t", "--help", "report -h"]
)
def test_standard_output_that_is_full_is_told(tmp_path: Path, words: str) -> None:
    result = shell(tmp_path, f"pyvmm {words} > /dev/full")

    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("pyvmm: standard output could not be written: No space left")
    assert result.returncode == 1


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", ["report t", "replay t", "--help", "report nowhere"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_descriptor_that_is_closed_is_no_error(
    tmp_path: Path, words: str, closed: str
) -> None:
    result = shell(tmp_path, f"pyvmm {words} {closed}")

    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert result.returncode == (2 if "nowhere" in words else 0)


def test_full_disk_anywhere_else_is_not_the_hosts_kvm() -> None:
    status, sentence = _explain(OSError(errno.ENOSPC, "No space left on device", "some/file"))

    assert status == 1
    assert sentence == "output could not be written: some/file: No space left on device; make room"


def test_memory_that_ran_out_is_said_in_words() -> None:
    status, sentence = _explain(MemoryError())

    assert (status, sentence[:30]) == (1, "pyvmm itself ran out of memory")
