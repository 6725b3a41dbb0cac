"""The table itself: it says something of every error, and it can be printed."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections import Counter

import pytest

from tests.injection import calls, injecting
from tests.injection.asking import ASKERS
from tests.injection.runs import BENCH, PAYLOAD
from tests.injection.table import BY_MODEL, BY_PROGRAM, OUTCOMES, TABLE, Row, word


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_row_names_known_outcomes_and_a_run(row: Row) -> None:
    programs = {each.scenario for each in TABLE if each.by == BY_PROGRAM}  # its own test runs it
    runs = {BY_PROGRAM: programs, BY_MODEL: ("attributes", "in-place", "pre-fault")}

    assert row.cells
    assert set(row.cells.values()) <= set(OUTCOMES)
    assert row.scenario in runs.get(row.by, (*BENCH, *PAYLOAD, *ASKERS, "restore"))


def test_rows_have_names_of_their_own() -> None:
    assert [name for name, count in Counter(row.name for row in TABLE).items() if count > 1] == []


def test_call_that_the_table_lacks_is_unknown() -> None:
    known = {("pread64", "disk"), ("KVM_RUN", "vCPU"), ("futex", ""), ("close", "disk")}
    new = {("sendfile", "disk"), ("KVM_SIGNAL_MSI", "VM"), ("userfaultfd", "")}

    assert calls.unknown(known | new) == new


def test_table_is_printed_with_a_row_for_each_call() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.injection"],
        cwd=injecting.ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip

    lines = done.stdout.splitlines()
    assert len(lines) == len(TABLE) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert word(errno.ENOSPC) in lines[0]
