"""The real command while calls fail: no traceback, no hang, nothing lost, the right status.

A test run does one errno of each row, and all interruptions and short counts of a scenario at
once; PYVMM_INJECT_FULL=1 does every cell of the table by itself, at the first, the second and the
last such call.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.injection import injecting, runs
from tests.injection.asking import ASKERS
from tests.injection.conftest import Without
from tests.injection.injecting import FOR_EVER, SHORT, Fault
from tests.injection.row import (
    BY_SHIM,
    BY_STRACE,
    CALLER,
    EINTR,
    ENDS_2,
    ENDS_3,
    RESET,
    SAID,
    SAME,
    Row,
)
from tests.injection.table import TABLE, word

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

IN_ROUNDS = [name for name, asker in ASKERS.items() if asker.has_rounds]
FULL = bool(os.environ.get("PYVMM_INJECT_FULL"))
full = pytest.mark.skipif(not FULL, reason="PYVMM_INJECT_FULL=1 runs them all")

ROWS = [row for row in TABLE if row.by in (BY_SHIM, BY_STRACE) and row.scenario not in IN_ROUNDS]
CELLS = [(row, error) for row in ROWS for error in row.cells]
SCENARIOS = sorted({row.scenario for row in ROWS if row.by == BY_SHIM and EINTR in row.cells})


def chosen(row: Row) -> int:
    """The errno that every test run injects."""
    failing = [error for error in row.cells if error not in (EINTR, SHORT)]
    return (failing or list(row.cells))[0]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Row) else word(value) if isinstance(value, int) else ""


def check(row: Row, error: int, folder: Path, without: Without) -> None:
    run = runs.injected(row, error, folder)

    assert runs.outcome(row, error, run) == row.cells[error], run.ended
    assert runs.problems(row, error, run, without(row.scenario)) == [], run.ended


@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize(
    ("row", "error"),
    # A guest that waits for a device that has stopped takes its time.
    [
        (row, chosen(row))
        for row in ROWS
        if FULL or (row.cells[chosen(row)] != RESET and not row.slow)
    ],
    ids=name_of,
)
def test_call_that_fails_ends_as_the_table_says(
    row: Row, error: int, tmp_path: Path, without: Without
) -> None:
    check(row, error, tmp_path, without)


@full
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize(
    ("row", "error"),
    [each for each in CELLS if FULL and each[1] != chosen(each[0])],
    ids=name_of,
)
def test_every_cell_of_the_table(row: Row, error: int, tmp_path: Path, without: Without) -> None:
    check(row, error, tmp_path, without)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_interrupted_and_short_calls_are_not_noticed(
    scenario: str, tmp_path: Path, without: Without
) -> None:
    """All of them in one run: the first some calls of each kind are interrupted, later ones move
    half of what they were asked for."""
    faults, rows = [], [row for row in ROWS if row.by == BY_SHIM and row.scenario == scenario]
    for row in rows:
        call = "ioctl" if row.request else row.call
        if row.cells.get(EINTR) == SAME:
            faults.append(Fault(call, row.match, EINTR, 1, 10, row.request))
    faults += [
        Fault(row.call, row.match, SHORT, 11, FOR_EVER)
        for row in rows
        if row.cells.get(SHORT) == SAME
    ]

    run = runs.seen(scenario, tmp_path, *faults)

    row = Row("all", "", "", {EINTR: SAME})
    assert runs.outcome(row, EINTR, run) == SAME, run.ended
    assert runs.problems(row, EINTR, run, without(scenario)) == []
    assert run.ended.injected == min(run.ended.seen, 10) > 0
    assert run.ended.output.splitlines()[-1] == without(scenario).ended.output.splitlines()[-1]


@pytest.mark.parametrize("scenario", IN_ROUNDS)
def test_calls_that_fail_one_after_the_other_end_as_the_table_says(
    scenario: str, tmp_path: Path, without: Without
) -> None:
    """In one run, which is asked the same for each."""
    cells = [
        (row, error)
        for row in TABLE
        if row.scenario == scenario
        for error in row.cells
        if FULL or error in (EINTR, SHORT, chosen(row))
    ]
    faults = [runs.fault_of(row, error) for row, error in cells]
    run = runs.seen(scenario, tmp_path, *faults, rounds=True)

    (as_ever,) = without(scenario).rounds
    found = {}
    for (row, error), answers, injected in zip(cells, run.rounds, run.ended.each, strict=True):
        said = SAID if row.cells[error] == SAID else SAME  # its line is counted below
        told = CALLER if runs.was_refused(answers) else said if answers == as_ever else str(answers)
        found[f"{row.name} {word(error)}"] = told if injected else "no such call"
    assert found == {f"{row.name} {word(error)}": row.cells[error] for row, error in cells}
    lines = run.ended.errors.splitlines()
    assert len(lines) == [row.cells[error] for row, error in cells].count(SAID), lines
    assert (run.ended.status, run.ended.output[-5:]) == (0, "done\n"), run.ended
    assert runs.problems(Row("all", "", "", {0: CALLER}), 0, run, without(scenario)) == []


WHEN = ("second", "last")


@full
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(
    "row", [row for row in ROWS if FULL and row.by == BY_SHIM and row.path != "start"], ids=name_of
)
def test_call_that_fails_once_leaves_no_trace_of_ours(
    row: Row, when: str, tmp_path: Path, without: Without
) -> None:
    """Whichever call it is: nothing is lost without a word, and nothing of pyvmm's own fails."""
    error = chosen(row)
    call = "ioctl" if row.request else row.call
    seen = runs.seen(
        row.scenario, tmp_path, Fault(call, row.match, error, FOR_EVER, 0, row.request)
    )
    number = min(2, seen.ended.seen) if when == "second" else seen.ended.seen
    fault = Fault(call, row.match, error, number, number, row.request)

    run = runs.seen(row.scenario, tmp_path, fault)

    assert run.ended.injected or when == "last"  # of which there may be fewer this time
    found = runs.outcome(row, error, run)
    known = (row.cells[error], SAME, SAID, RESET, runs.COUNTED, ENDS_2, ENDS_3)
    assert found in known, run.ended
    if found == SAME:
        as_same = row._replace(cells={error: SAME})
        assert runs.problems(as_same, error, run, without(row.scenario)) == []


def test_what_the_host_refuses_in_the_middle_of_a_run_leaves_a_report(tmp_path: Path) -> None:
    """An error that no device or caller could be told: of the loop's own eventfd, say."""
    words = runs.words_of("pread", tmp_path)

    ended = injecting.run_under_strace(
        words, "read", errno.EIO, "anon_inode:[eventfd]", 1, FOR_EVER
    )

    assert ended.injected
    assert (ended.status, ended.errors) == (
        3,
        "pyvmm: the host refused what the run needs: Input/output error\n",
    )
    assert '"exit": "internal-error"' in (tmp_path / "report.json").read_text()


@full
def test_trace_that_ended_early_is_still_one(tmp_path: Path) -> None:
    words = runs.words_of("trace", tmp_path)

    ended = injecting.run(words, Fault("write", "data.ninja", errno.ENOSPC, 5, FOR_EVER))
    report = runs.report_of_trace(tmp_path)

    assert (ended.status, report.returncode) == (0, 0)
    assert ended.errors == (
        "pyvmm: --trace: writing failed, the trace ends here: No space left on device\n"
    )
