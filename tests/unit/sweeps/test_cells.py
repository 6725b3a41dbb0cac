"""Cells on machines: what a guest may write is its own, and labs take turns."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vmm.sweeps import cells
from vmm.sweeps.cells import CellFailed, Cells

WORDS: Mapping[str, Any] = {
    "kind": "lab",
    "about": {"words": ["--kernel", "debian:6.12"], "input": "poweroff -f\n"},
    "policies": [{"spec": "vmm.policy.builtin:Quota", "words": ["limit=1M"]}],
    "seed": 0,
    "seconds": 60,
    "modules": {},
}


def test_disk_that_a_guest_may_write_is_a_copy(tmp_path: Path) -> None:
    disk, folder = tmp_path / "d.img", tmp_path / "cell"
    disk.write_bytes(b"disk")
    folder.mkdir()
    words = ["--disk", str(disk), "--disk", f"{disk},ro", f"--lab-disk={disk},format=raw", "--x"]

    made = cells._with_own_disks(words, str(folder))

    first, third = made[1], made[4].removeprefix("--lab-disk=").removesuffix(",format=raw")
    assert made == [
        "--disk",
        first,
        "--disk",
        f"{disk},ro",
        f"--lab-disk={third},format=raw",
        "--x",
    ]
    for copy in (first, third):
        assert Path(copy).parent == folder
        assert Path(copy).read_bytes() == b"disk"
    assert first != third


def test_disk_that_is_missing_fails_its_cell(tmp_path: Path) -> None:
    with pytest.raises(CellFailed, match=r"nowhere can't be copied for a guest: No such file"):
        cells._with_own_disks(["--disk", f"{tmp_path}/nowhere"], str(tmp_path))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where locks are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def fake_lab(monkeypatch: pytest.MonkeyPatch, status: int, said: str) -> list[list[str]]:
    """`pyvmm lab` as a function; the commands that it got."""
    got: list[list[str]] = []

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[bytes]:
        got.append(command)
        return subprocess.CompletedProcess(command, status, said.encode())

    monkeypatch.setattr(subprocess, "run", run)
    return got


def test_lab_that_ends_without_a_trace_fails_its_cell_with_what_it_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    got = fake_lab(monkeypatch, 3, "first\npyvmm: the host cannot do it\n")
    carried = Cells(waits=lambda: told.append("waits"), begins=lambda: told.append("begins"))

    with pytest.raises(CellFailed) as raised:
        carried.run(WORDS)

    assert str(raised.value) == "pyvmm lab ended with status 3: pyvmm: the host cannot do it"
    assert raised.value.log == "first\npyvmm: the host cannot do it\n"
    assert told == ["waits", "begins"]
    command = got[0]
    assert command[:5] == [sys.executable, "-m", "vmm", "lab", "--lab-quiet"]
    assert command[5:7] == ["--kernel", "debian:6.12"]
    assert command[-5:] == [
        "--private-mem", "--policy", "vmm.policy.builtin:Quota", "--policy-arg", "limit=1M",
    ]  # fmt: skip


def test_second_lab_on_a_machine_waits_for_the_first(home: Path) -> None:
    program = (
        "import json, sys\n"
        "from vmm.sweeps.cells import _turn_at\n"
        "print('asks', flush=True)\n"
        "with _turn_at('lab'):\n"
        "    print('has it', flush=True)\n"
    )
    with cells._turn_at("lab"):
        other = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"asks\n"
        # It is at the lock, or about to be: while it is held here nobody else gets it.
        (lock,) = (home / "pyvmm").glob("sweep-lab-*.lock")
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.set_blocking(other.stdout.fileno(), False)
        with pytest.raises(BlockingIOError):
            os.read(other.stdout.fileno(), 100)
        os.set_blocking(other.stdout.fileno(), True)
    assert other.stdout.readline() == b"has it\n"
    assert other.wait(60) == 0
    other.stdout.close()
