"""No run makes a call on a data path that the table of errors doesn't know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.injection import calls, injecting, runs
from tests.injection.asking import MEMORY, Debugger, Reader, Saver, snapshot
from tests.injection.injecting import Process
from tests.injection.test_runs import FULL

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm", "strace")]

SHORTLY = ("fd2fd", "remap")
OTHERS = ("pread", "hva", "mmap", "trace", "none", "cbit", "readable", "process")


@pytest.mark.parametrize("scenario", SHORTLY + (OTHERS if FULL else ()))
def test_run_makes_no_call_that_the_table_lacks(scenario: str, tmp_path: Path) -> None:
    made = calls.recorded(runs.words_of(scenario, tmp_path), tmp_path)

    assert sorted(calls.unknown(made)) == []
    assert ("KVM_RUN", "vCPU") in made and ("write", "console") in made


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

    made = calls.recorded(words, tmp_path, ask)

    assert sorted(calls.unknown(made)) == []
    known = {("writev", "fuse"), ("KVM_SET_GUEST_DEBUG", "vCPU"), ("KVM_GET_LAPIC", "vCPU")}
    assert known < made and ("pwrite64", "saved") in made


def test_run_that_is_restored_makes_no_call_that_the_table_lacks(tmp_path: Path) -> None:
    words = injecting.pyvmm("--restore", str(snapshot()))

    made = calls.recorded(words, tmp_path, typed=b"x")

    assert sorted(calls.unknown(made)) == []
    assert {("KVM_SET_LAPIC", "vCPU"), ("pread64", "saved")} < made
