"""Devices, callers and memory files while their calls fail, in programs of their own.

A test run does one errno of each row; PYVMM_INJECT_FULL=1 all of them.
"""

from __future__ import annotations

import os

import pytest

from tests.injection import injecting, runs, taps
from tests.injection.injecting import SHORT, Fault
from tests.injection.row import BY_PROGRAM, DROPPED, Row
from tests.injection.table import TABLE, word
from tests.injection.test_runs import FULL, chosen, full, name_of

ROWS = [row for row in TABLE if row.by == BY_PROGRAM]


# What is short is where bytes get lost.
CHOSEN = [(row, SHORT if row.path == "memory" else chosen(row)) for row in ROWS]


@pytest.mark.parametrize("needs", ["nothing", "a tap", "KVM"])
def test_calls_that_fail_end_as_the_table_says(needs: str) -> None:
    """One of each row, all in one process."""
    cells = [(row, error) for row, error in CHOSEN if _needs(row) == needs]
    if why := _obstacle(cells[0][0]):
        pytest.skip(f"can't be had here: {why}")

    found = runs.carried_out(*cells)

    expected = [row.cells[error] for row, error in cells]
    assert dict(zip(map(named, cells), found, strict=False)) == dict(
        zip(map(named, cells), expected, strict=True)
    )


def _needs(row: Row) -> str:
    if row.on == "tap":
        return "a tap"
    return "KVM" if row.scenario == "message" else "nothing"


def _obstacle(row: Row) -> str:
    """Why what the row needs isn't here; empty: it is."""
    needs = _needs(row)
    if needs == "a tap":
        return taps.obstacle()
    has_kvm = needs == "nothing" or os.access("/dev/kvm", os.R_OK | os.W_OK)
    return "" if has_kvm else "no KVM that may be opened"


@pytest.fixture
def tap() -> None:
    if taps.obstacle():
        pytest.skip(f"no tap can be made here: {taps.obstacle()}")


@pytest.mark.usefixtures("tap")
def test_tap_that_is_deleted_is_a_pulled_cable() -> None:
    ended = injecting.programs(("tap-deleted", Fault("none")))

    assert (ended.output, ended.errors) == (f"{DROPPED}\n", "")


def named(cell: tuple[Row, int]) -> str:
    return f"{cell[0].name} {word(cell[1])}"


@full
@pytest.mark.parametrize(
    ("row", "error"),
    [(row, error) for row in ROWS if FULL for error in row.cells],
    ids=name_of,
)
def test_every_cell_of_the_table(row: Row, error: int) -> None:
    if why := _obstacle(row):
        pytest.skip(f"can't be had here: {why}")
    assert runs.carried_out((row, error)) == [row.cells[error]]
