"""How far a sweep is, and how long the rest takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.cli.sweep import duration_text, progress
from vmm.sweeps import running
from vmm.sweeps.definition import parse
from vmm.sweeps.jobs import Job, Plan
from vmm.sweeps.running import Progress
from vmm.sweeps.store import Result

ROOT = Path(__file__).resolve().parents[3]
DONE = Result("ok", {"guest_ns": 1.0}, None, None, None, "here", 2.0, 1)


def plan() -> Plan:
    """Four quick cells and four slow ones."""
    definition = parse(
        {
            "policy": [{"use": "m:A", "parameters": {"n": [1, 2, 3, 4]}}],
            "workload": [{"name": name, "replay": name} for name in ("quick", "slow")],
        },
        "s", "s", "",
    )  # fmt: skip
    cells = list(definition.cells())
    jobs = tuple(Job(f"{number}", cell, {}) for number, cell in enumerate(cells))
    return Plan(definition, jobs, {})


def test_time_left_goes_by_what_cells_of_a_workload_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("vmm.sweeps.running.time.monotonic", lambda: now[0])
    made = plan()
    todo = {job.key: job for job in made.jobs}
    count = running._Count(made, {}, todo)

    at_first = count.progress(2)
    # Two at once: a quick cell of 2 s and a slow one of 8 s have taken 5 s.
    now[0] = 105.0
    count.note(made.jobs[0], DONE)
    count.note(made.jobs[4], DONE._replace(seconds=8.0))
    later = count.progress(2)

    assert (at_first.stored, at_first.seconds_left) == (0, None)
    assert (later.cells, later.stored, later.failed) == (8, 2, 0)
    assert later.seconds_left == pytest.approx((3 * 2.0 + 3 * 8.0) / 2)


def test_results_of_earlier_times_count_as_stored() -> None:
    made = plan()
    statuses = {"0": "ok", "1": "failed"}
    todo = {job.key: job for job in made.jobs if job.key not in statuses}

    now = running._Count(made, statuses, todo).progress(1)

    assert (now.cells, now.stored, now.failed) == (8, 2, 1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (36000, "10.0 h")]
)
def test_duration_is_in_words(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_scheduler_without_workers_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    with progress() as told:
        for stored, slots in ((0, 0), (0, 0), (1, 2), (3, 0)):
            told(Progress(3, stored, 0, slots, None))

    assert capfd.readouterr().err == (
        "pyvmm: the scheduler has no workers; waiting for some (Ctrl-C ends it)\n"
    )


def test_terminal_shows_how_far_it_is(folder: Path) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vmm", "sweep", "s.toml"],
        stdout=subprocess.DEVNULL, stderr=theirs, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # EIO: the other side is closed
        pass
    os.close(ours)

    assert process.wait(60) == 0
    assert b"3/3" in shown
    assert b"0 s left" in shown
