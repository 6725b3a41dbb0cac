"""The table itself: it says something of every error, and it can be printed."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections import Counter

import pytest

from tests.injection import calls, injecting, recording
from tests.injection.asking import ASKERS
from tests.injection.recording import END, NOWHERE, RUNNING, START, Call
from tests.injection.row import BY_MODEL, BY_PROGRAM, OUTCOMES, Row
from tests.injection.runs import BENCH, DEVICES, PAYLOAD
from tests.injection.table import TABLE, word


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_row_names_known_outcomes_and_a_run(row: Row) -> None:
    programs = {each.scenario for each in TABLE if each.by == BY_PROGRAM}  # its own test runs it
    runs = {BY_PROGRAM: programs, BY_MODEL: ("attributes", "in-place", "pre-fault")}

    assert row.cells
    assert set(row.cells.values()) <= set(OUTCOMES)
    assert row.scenario in runs.get(row.by, (*BENCH, *PAYLOAD, *DEVICES, *ASKERS, "restore"))


def test_rows_have_names_of_their_own() -> None:
    assert [name for name, count in Counter(row.name for row in TABLE).items() if count > 1] == []


def test_call_that_the_table_lacks_is_unknown() -> None:
    known = {("pread64", "disk"), ("KVM_RUN", "vCPU"), ("futex", ""), ("close", "disk")}
    new = {
        ("sendfile", "disk"), ("KVM_SIGNAL_MSI", "VM"), ("userfaultfd", ""), ("openat", "/a/path"),
        ("mount", "memory file"),  # there is a row, but for the start
    }  # fmt: skip

    found = calls.unknown(Call(RUNNING, *each) for each in known | new)

    assert found == {Call(RUNNING, *each) for each in new}


def test_recording_tells_phases_objects_and_requests() -> None:
    log = """\
7 openat(-100</root>, "/dev/fuse", 0x80002) = 5</dev/fuse>
7 mmap(NULL, 4096, 0x3, 0x1, 9</memfd:pyvmm-shared>(deleted), 0) = 0x7
7 seccomp(0x1, 0x1, {len=404, filter=0x5}) = 0
8 ioctl(11<anon_inode:kvm-vcpu:0>, 0xae80, 0 <unfinished ...>
7 openat(5</t/run>, "changes", 0x0) = -1 EACCES (Permission denied)
8 <... ioctl resumed>) = 0
7 rename("/t/run/.pyvmm-1.tmp", "/t/run/report.json") = 0
"""

    assert recording.calls_of(log, "/t/run") == {
        Call(START, "openat", "/dev/fuse"),
        Call(START, "mmap", "shared memory"),
        Call(RUNNING, "seccomp", NOWHERE),
        Call(RUNNING, "KVM_RUN", "vCPU"),
        Call(END, "openat", "/t/run/changes"),
        Call(END, "rename", "report"),
    }


def test_table_is_printed_with_a_row_for_each_call() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.injection"],
        cwd=injecting.ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip

    lines = done.stdout.splitlines()
    assert len(lines) == len(TABLE) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert word(errno.ENOSPC) in lines[0]
