"""No run makes a kind of call that has neither a row in the table of errors nor a reason why not.

A test run records some of them; PYVMM_INJECT_FULL=1 all.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from kvm_bindings import ioctls
from kvm_bindings.aarch64 import ioctls as arm
from kvm_bindings.x86_64 import ioctls as x86
from tests.injection import calls, injecting, recording, runs, taps
from tests.injection.asking import MEMORY, Debugger, Reader, Saver, snapshot
from tests.injection.injecting import Process
from tests.injection.reasons import IOCTLS
from tests.injection.recording import END, NOWHERE, RUNNING, START, Call, recorded
from tests.injection.row import BY_PROGRAM, SAME
from tests.injection.table import TABLE
from tests.injection.test_runs import FULL, full

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm", "strace")]

SHORTLY = ("fd2fd", "devices apart")
OTHERS = (
    "pread", "hva", "mmap", "trace", "process", "none", "cbit", "remap", "readable", "devices",
)  # fmt: skip


@pytest.mark.parametrize("scenario", SHORTLY + (OTHERS if FULL else ()))
def test_run_makes_no_call_that_the_table_lacks(scenario: str, tmp_path: Path) -> None:
    made = recorded(runs.words_of(scenario, tmp_path), tmp_path)

    assert sorted(calls.unknown(made)) == []
    seen = {Call(RUNNING, "KVM_RUN", "vCPU"), Call(START, "openat", "/dev/kvm")}
    assert seen | {Call(END, "rename", "report")} < made


def test_run_that_is_asked_makes_no_call_that_the_table_lacks(tmp_path: Path) -> None:
    """With a control socket, a memory file, a debugger and a trace; and saved."""
    runs.require("gdb", "memory file")
    saver = Saver(tmp_path)
    askers = [Debugger(tmp_path), Reader(tmp_path), saver]
    options = {option: None for asker in askers for option in asker.options()}
    words = injecting.pyvmm(*options, *MEMORY, "--trace", str(tmp_path / "trace"))

    def ask(process: Process) -> None:
        askers[0].wait(process)
        for asker in askers:
            asker.prepare()
            asker.ask()
        saver.quit()

    made = recorded(words, tmp_path, ask)

    assert sorted(calls.unknown(made)) == []
    running = {("writev", "/dev/fuse"), ("KVM_GET_LAPIC", "vCPU"), ("pwrite64", "saved")}
    seen = {Call(RUNNING, *each) for each in running}
    assert seen | {Call(START, "mount", "memory file"), Call(START, "bind", "socket")} < made


def test_run_that_is_restored_makes_no_call_that_the_table_lacks(tmp_path: Path) -> None:
    words = injecting.pyvmm("--restore", str(snapshot()))

    made = recorded(words, tmp_path, typed=b"x")

    assert sorted(calls.unknown(made)) == []
    assert {Call(START, "KVM_SET_LAPIC", "vCPU"), Call(START, "pread64", "snapshot")} < made


def test_programs_make_no_call_that_the_table_lacks(tmp_path: Path) -> None:
    """Devices that no guest here drives, and what asks a run from outside: while they are looked
    at, not in what leads there."""
    rows = [row for row in TABLE if row.by == BY_PROGRAM]
    names = sorted({row.scenario for row in rows if row.on != "tap" or not taps.obstacle()})
    words = [sys.executable, "-m", "tests.injection.programs"]
    words += [word for name in names for word in (name, "0")]
    counts = tmp_path / "counts"
    counts.write_bytes(bytes(4096))
    environment = {
        "LD_PRELOAD": injecting.shim(), "PYVMM_INJECT_COUNTS": str(counts),
        "PYVMM_INJECT_WAITS": "1",
    }  # fmt: skip

    made = recorded(words, tmp_path, environment=environment)

    assert (tmp_path / "console.out").read_text() == f"{SAME}\n" * len(names)
    of_the_test = {Call(RUNNING, "writev", "saved")}  # a core file, in the place of a run
    assert sorted(calls.unknown(made) - of_the_test) == []
    seen = {("connect", "socket"), ("KVM_SET_GSI_ROUTING", "VM"), ("rename", "snapshot")}
    assert {Call(RUNNING, *each) for each in seen} < made


@full
def test_tap_makes_no_call_that_the_table_lacks(tmp_path: Path) -> None:
    if taps.obstacle() or shutil.which("unshare") is None:
        pytest.skip(f"no tap can be made here: {taps.obstacle()}")
    words = ["unshare", "-n", *injecting.pyvmm("--net", "tap=pyvmm0", "--mem", "64M")]

    made = recorded(words, tmp_path)

    assert sorted(calls.unknown(made) - {Call(START, "unshare", NOWHERE)}) == []
    assert Call(START, "TUNSETIFF", "tap") in made


def test_ioctl_of_the_bindings_has_a_row_or_a_reason() -> None:
    requests = {
        name
        for module in (ioctls, x86, arm)
        for name, value in vars(module).items()
        if name.startswith("KVM_") and recording.is_ioctl(value)
    }

    found = requests - {row.call for row in TABLE} - {name for names, _ in IOCTLS for name in names}

    assert sorted(found) == []
    assert {"KVM_RUN", "KVM_SET_DEVICE_ATTR", "KVM_ARM_VCPU_INIT"} < requests
