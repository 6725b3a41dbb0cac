"""qemu-storage-daemon serves guests on this machine's KVM: it gets the shared side, and no more."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import firmware
from tests.support import guests
from tests.support.storage_daemon import Between, StorageDaemon

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
SECONDS = 60
MANY = "-- rr4096x8n64 rr4096x1n100000000"
"""Requests, a line on the console, and more requests than there is time for."""
READY = b"ready\r\n"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(4 * MIB))
    return path


@pytest.fixture
def daemon(tmp_path: Path, image: Path) -> Iterator[StorageDaemon]:
    made = StorageDaemon(image, tmp_path / "s")
    yield made
    made.kill()


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["timeout", str(SECONDS), sys.executable, "-m", "vmm", "--report", "r.json", *options],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return report


def data_in(fd: int) -> list[tuple[int, int]]:
    """What the file holds, as (start, end)."""
    found, at = [], 0
    with contextlib.suppress(OSError):  # ENXIO after the last
        while True:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, at))
    return found


def test_back_end_serves_the_payload_and_keeps_nothing_that_is_private(
    tmp_path: Path, daemon: StorageDaemon
) -> None:
    between = Between(tmp_path / "front", tmp_path / "s")

    run = start(tmp_path, "--private-mem", "--disk", "vhost-user=front")
    output, said = run.communicate(timeout=SECONDS)

    assert run.returncode == 0, output + said
    assert "payload: all 26 checks passed" in output
    report = report_of(tmp_path)
    use = report["vhost_user"]["blk0"]
    assert use["memory_bytes"] == sum(size for _, size in use["regions"]) == 512 * MIB
    assert (use["connected"], use["lost"]) == (True, 0)
    assert report["backings"]["shared"] == "memfd-sealed"
    # The payload has unshared all but its own 2 MiB by now: the back end's descriptor of the
    # memory shows nothing else.
    assert report["pages"]["shared_bytes"] == 2 * MIB
    memory = between.memory()
    assert len({os.fstat(fd).st_ino for fd in memory}) == 1
    extents = data_in(memory[0])
    assert extents
    assert extents[-1][1] <= 2 * MIB
    with pytest.raises(OSError) as refused:
        os.ftruncate(memory[0], 0)
    assert refused.value.errno == errno.EPERM
    assert fcntl.fcntl(memory[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    between.close()


def test_guest_of_a_killed_back_end_gets_errors_and_the_machine_goes_on(
    tmp_path: Path, daemon: StorageDaemon
) -> None:
    run = start(
        tmp_path, "--kernel", firmware.bench_path(), "--mem", "128M", "--append", MANY,
        "--disk", "vhost-user=s",
    )  # fmt: skip
    assert run.stdout is not None
    while not run.stdout.readline().startswith("result"):
        pass

    daemon.kill()
    output, said = run.communicate(timeout=SECONDS)

    assert run.returncode == 0, said
    assert "error a request that failed" in output
    assert [line for line in said.splitlines() if "has lost its back end at s" in line]
    report = report_of(tmp_path)
    assert report["io"]["blk0"]["errors"] > 0
    assert report["vhost_user"]["blk0"]["lost"] == 1


def test_no_byte_of_the_data_path_comes_through_python(
    tmp_path: Path, daemon: StorageDaemon
) -> None:
    """Of a hundred notifies KVM passes on all but the first."""
    run = start(
        tmp_path, "--kernel", firmware.bench_path(), "--mem", "128M",
        "--append", "-- rr4096x1n100", "--disk", "vhost-user=s",
    )  # fmt: skip
    output, said = run.communicate(timeout=SECONDS)

    assert "done" in output, said
    report = report_of(tmp_path)
    assert report["io_ports"]["0xc080"] == 1
    assert report["io"]["blk0"]["requests"] == 0


def test_a_restart_connects_a_successor_from_outside_of_the_sandbox(
    tmp_path: Path, image: Path, daemon: StorageDaemon, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "kernel").write_bytes(guests.kernel(guests.say(READY) + guests.echo()))
    run = start(
        tmp_path, "--kernel", "kernel", "--mem", "16M", "--disk", "vhost-user=s",
        "--control", "c",
    )  # fmt: skip
    assert run.stdout is not None and run.stderr is not None
    assert run.stdout.readline() == READY.decode().replace("\r", "")

    daemon.kill()
    told = [run.stderr.readline()]
    second = StorageDaemon(image, tmp_path / "s")
    request.addfinalizer(second.kill)
    ctl = [sys.executable, "-m", "vmm", "ctl", "c", "device", "restart", "blk0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(ctl, cwd=tmp_path, env=environment, check=True, capture_output=True)
    told.append(run.stderr.readline())
    again = subprocess.run(
        ctl, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=SECONDS)

    assert "has lost its back end" in told[0]
    assert "another back end has taken over" in told[1]
    assert again.returncode != 0
    assert "blk0: its back end at s is connected" in again.stdout
    report = report_of(tmp_path)
    assert report["sandbox"]["seccomp"] is True
    use = report["vhost_user"]["blk0"]
    assert (use["connected"], use["lost"], use["restarts"]) == (True, 1, 1)


def test_no_back_end_is_one_line_and_status_2(tmp_path: Path) -> None:
    run = start(tmp_path, "--disk", "vhost-user=none")
    _, said = run.communicate(timeout=SECONDS)

    assert run.returncode == 2
    assert len(said.splitlines()) == 1
    assert "start the back end first: qemu-storage-daemon" in said
