"""No run makes a call on a data path that the table of errors doesn't know."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import IO

import pytest

from tests.injection import calls, injecting, runs
from tests.injection.test_runs import FULL

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm", "strace")]

SHORTLY = ("fd2fd", "remap")
OTHERS = ("pread", "hva", "mmap", "trace", "none", "cbit", "readable", "process")


@pytest.mark.parametrize("scenario", SHORTLY + (OTHERS if FULL else ()))
def test_run_makes_no_call_that_the_table_lacks(scenario: str, tmp_path: Path) -> None:
    made = calls.recorded(runs.words_of(scenario, tmp_path), tmp_path)

    assert sorted(calls.unknown(made)) == []
    assert ("KVM_RUN", "vCPU") in made and ("write", "console") in made


def test_run_that_is_asked_and_read_makes_no_call_that_the_table_lacks(tmp_path: Path) -> None:
    """With a control socket, a memory file and a trace."""
    from vmm.control.memory_file.place import Place
    from vmm.core.errors import HostError

    try:
        Place(str(tmp_path / "tried")).leave(mounted=False)
    except HostError as error:
        pytest.skip(str(error))
    control, memory = tmp_path / "control", tmp_path / "memory"
    words = injecting.pyvmm("--private-mem=memfd", "--mem", "64M", "--gdb", str(tmp_path / "gdb"))
    words += ["--control", str(control), "--memory-file", str(memory)]
    words += ["--trace", str(tmp_path / "trace")]

    def ask(errors: IO[str]) -> None:
        while "waits for a debugger" not in (said := errors.readline()):
            assert said, "it has ended"
        fd = os.open(memory / "memory", os.O_RDWR)
        os.pwrite(fd, os.pread(fd, 4096, 0), 0)
        os.close(fd)
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(control))
            for command in ("status", "dump-state", "quit"):
                caller.sendall(json.dumps({"command": command}).encode() + b"\n")
                assert json.loads(caller.makefile("rb").readline())["ok"]

    made = calls.recorded(words, tmp_path, ask)

    assert sorted(calls.unknown(made)) == []
    assert ("sendto", "socket") in made
