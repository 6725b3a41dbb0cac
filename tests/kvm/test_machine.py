"""Machines in this process: nothing is left behind, whether a run succeeds or cannot start."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.images import build_bzimage, build_elf
from vmm.cli.main import main
from vmm.conversion.schemes.plain import PlainScheme
from vmm.core.errors import HostError, PyvmmError
from vmm.exits.outcome import FAILED, POWEROFF, Outcome
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

WATCHDOG_SECONDS = 60.0


def run_payload(**options: object) -> Outcome:
    """The embedded payload in 16 MiB under a watchdog."""
    machine = Machine(MachineConfig(memory=16 << 20, **options))  # type: ignore[arg-type]
    watchdog = threading.Timer(WATCHDOG_SECONDS, machine.stop, [Outcome(FAILED, "watchdog")])
    watchdog.start()
    try:
        return machine.run()
    finally:
        watchdog.cancel()
        watchdog.join()


def open_fds() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


def test_runs_in_a_row_leave_no_fd_no_thread_no_mapping_and_no_memory() -> None:
    # In a process of its own, in which nothing else comes and goes.
    script = Path(__file__).parents[1] / "bench" / "cycles.py"

    done = subprocess.run(
        [sys.executable, str(script), "--cycles", "30"],
        cwd=script.parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_payload_powers_off_beside_processors_that_nobody_starts() -> None:
    threads = threading.active_count()

    assert run_payload(private_memory="auto", cpus=8).exit == POWEROFF

    assert threading.active_count() == threads


def test_run_that_fails_at_any_open_leaves_no_fd_and_says_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And another for its report, once there is one to write: that is a second loss."""
    (tmp_path / "disk").write_bytes(bytes(4096))
    arguments = ["--private-mem", "--mem", "16M", "--disk", str(tmp_path / "disk")]
    arguments += ["--report", str(tmp_path / "r.json")]
    assert main(arguments) == 0  # everything is imported now
    capfd.readouterr()
    before = open_fds()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    statuses = []

    for extra in range(32):
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + extra, limits[1]))
        try:
            statuses.append(main(arguments))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        said = capfd.readouterr().err
        assert open_fds() == before
        if statuses[-1] == 0:
            break
        *lost, last = said.splitlines()
        assert last.startswith("pyvmm: ") and "Too many open files" in last
        assert len(lost) <= 1
        for line in lost:
            assert re.match(r"pyvmm: --report \S+ could not be written: Too many open files", line)

    assert statuses[-1] == 0
    assert set(statuses[:-1]) <= {2, 3}


def test_memslots_that_kvm_refuses_keep_the_guest_from_starting_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: PlainScheme, vm: object, memory: object) -> None:
        raise OSError(errno.ENOMEM, "no room for a memslot")

    run_payload()  # everything is imported now
    before = open_fds(), threading.active_count()
    monkeypatch.setattr(PlainScheme, "install", refuse)

    with pytest.raises(HostError, match="no room for a memslot"):
        run_payload()

    assert (open_fds(), threading.active_count()) == before


def test_report_of_a_stopped_machine_is_written(tmp_path: Path) -> None:
    machine = Machine(MachineConfig(memory=16 << 20))
    machine.stop = lambda outcome: Machine.stop(machine, Outcome(FAILED, "first"))  # type: ignore[method-assign]

    assert machine.run().reason == "first"

    assert machine.report is not None
    assert machine.report["guest"] == {"exit": FAILED, "reason": "first"}


@pytest.mark.parametrize("image", [build_elf(), build_bzimage()], ids=["vmlinux", "bzImage"])
def test_bad_disk_beside_a_good_kernel_leaves_no_fd(tmp_path: Path, image: bytes) -> None:
    (tmp_path / "kernel").write_bytes(image)
    config = MachineConfig(kernel=str(tmp_path / "kernel"), disks=("/nowhere",))
    before = open_fds()

    with pytest.raises(PyvmmError, match="/nowhere: no such file"):
        Machine(config).run()

    assert open_fds() == before


def test_bad_input_raises_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PyvmmError, match="no such file"):
        Machine(MachineConfig(disks=("/nowhere",))).run()

    assert capfd.readouterr() == ("", "")
