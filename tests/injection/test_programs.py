"""Devices, callers and memory files while their calls fail, in programs of their own.

A test run does one errno of each row; PYVMM_INJECT_FULL=1 all of them.
"""

from __future__ import annotations

import pytest

from tests.injection import runs
from tests.injection.injecting import SHORT
from tests.injection.table import BY_PROGRAM, TABLE, Row
from tests.injection.test_runs import FULL, chosen, name_of

ROWS = [row for row in TABLE if row.by == BY_PROGRAM]


def errors_of(row: Row) -> list[int]:
    if FULL:
        return list(row.cells)
    # A call that isn't made again is where bytes get lost.
    return [SHORT] if row.path == "memory" and SHORT in row.cells else [chosen(row)]


@pytest.mark.parametrize(
    ("row", "error"), [(row, error) for row in ROWS for error in errors_of(row)], ids=name_of
)
def test_call_that_fails_ends_as_the_table_says(row: Row, error: int) -> None:
    assert runs.carried_out(row, error) == row.cells[error]
