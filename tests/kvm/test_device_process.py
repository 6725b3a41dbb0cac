"""Devices in processes of their own, under guests on KVM: their sandbox, and their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings import sandbox
from tests.support import command
from tests.support.control_client import ask
from tests.support.hostile_device import MUST_WORK, PORT, ROOM, TAKES_CALLERS
from vmm.bench.processes import bench_guest

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

ROOT = Path(__file__).resolve().parents[2]
DISK_BYTES = 1 << 20
needs_landlock = pytest.mark.skipif(
    sandbox.landlock_version() == 0, reason="this kernel has no Landlock, or it is switched off"
)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (DISK_BYTES // 256))
    return path


def _hostile(disk: Path, *options: str) -> dict[str, str]:
    """How the attempts of a disk's process ended, under the payload."""
    (disk.parent / "secret.txt").write_text("secret")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.hostile_device", "--private-mem",
         "--disk", "disk.img,process", *options],
        cwd=disk.parent, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True,
        timeout=command.TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ended: dict[str, str] = json.loads(disk.read_bytes()[:ROOM])
    return ended


@needs_landlock
def test_hostile_process_is_refused_everything_and_the_run_goes_on(disk: Path) -> None:
    ended = _hostile(disk)

    assert {name for name, how in ended.items() if how == "ok"} == MUST_WORK
    assert set(ended.values()) == {"ok", "EPERM"}


def test_hostile_process_without_a_sandbox_has_no_guest_memory(disk: Path) -> None:
    """The attempts are real ones; and what it was never given it hasn't even so."""
    ended = _hostile(disk, "--sandbox=off")

    assert ended["read a file"] == ended["fork"] == ended["map the disk"] == "ok"
    assert ended["KVM"] == "ENOTTY"


def _hostile_vsock(folder: Path, *options: str) -> dict[str, str]:
    """How the attempts of a vsock's process ended. It tells of them by a connection that it was
    given."""
    (folder / "secret.txt").write_text("secret")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / f"v_{PORT}"))
        listener.listen()
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.hostile_device", "--private-mem",
             "--vsock", "path=v,process", *options],
            cwd=folder, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=command.TIME_LIMIT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        listener.settimeout(command.TIME_LIMIT)
        told = b""
        while not told:  # an attempt to connect may have been one
            link, _ = listener.accept()
            with link, link.makefile("rb") as file:
                told = file.read()
        ended: dict[str, str] = json.loads(told)
        return ended


@needs_landlock
def test_hostile_vsock_is_given_its_ports_and_connects_nowhere_itself(tmp_path: Path) -> None:
    ended = _hostile_vsock(tmp_path)

    works = {name for name in MUST_WORK if not name.endswith("the disk")}
    assert {name for name, how in ended.items() if how == "ok"} == works | TAKES_CALLERS
    assert set(ended.values()) == {"ok", "EPERM"}
    assert not (tmp_path / "v").exists()


@needs_landlock
def test_hostile_console_is_refused_everything_but_its_callers(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")

    done = subprocess.run(
        [sys.executable, "-m", "tests.support.hostile_device", "--private-mem", "--report",
         "r.json", "--console", "file=told,process", "--console", "socket=s,name=n,process"],
        cwd=tmp_path, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True,
        timeout=command.TIME_LIMIT, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    ended = json.loads((tmp_path / "told").read_bytes())
    works = {name for name in MUST_WORK if not name.endswith("the disk")}
    assert {name for name, how in ended.items() if how == "ok"} == works | TAKES_CALLERS
    assert set(ended.values()) == {"ok", "EPERM"}
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["io"]["console"]["process"]["seccomp"]
    assert not (tmp_path / "s").exists()


def test_hostile_vsock_without_a_sandbox_connects(tmp_path: Path) -> None:
    """The attempts are real ones."""
    ended = _hostile_vsock(tmp_path, "--sandbox=off")

    assert ended["a port's program by hand"] == ended["a Unix socket"] == ended["TCP"] == "ok"


@pytest.mark.parametrize(("setting", "ended"), [("", "ok"), (",process", "EPERM")])
def test_pyvmm_may_connect_only_where_the_vsock_is_its_own(
    tmp_path: Path, setting: str, ended: str
) -> None:
    """Tried by a thread that isn't a vCPU's, which never may."""
    (tmp_path / "connects.py").write_text(
        "import errno, socket, sys, threading\n"
        "from vmm.policy import Allow, Policy\n"
        "class Connects(Policy):\n"
        "    def __init__(self):\n"
        "        self.now = threading.Event()\n"
        "        self.thread = threading.Thread(target=self.connect, daemon=True)\n"
        "        self.thread.start()\n"
        "    def connect(self):\n"
        "        self.now.wait()\n"
        "        try:\n"
        "            socket.socket(socket.AF_UNIX).connect('v')\n"
        "            print('connect: ok', file=sys.stderr)\n"
        "        except OSError as error:\n"
        "            print(f'connect: {errno.errorcode[error.errno]}', file=sys.stderr)\n"
        "    def on_share(self, event, view):\n"
        "        self.now.set()\n"
        "        self.thread.join()\n"
        "        return Allow()\n"
    )

    done = command.run(
        "--private-mem", "--vsock", f"path=v{setting}", "--policy", "connects.py:Connects",
        cwd=tmp_path, env=_environment(),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert f"connect: {ended}".encode() in done.stderr


def test_payload_passes_all_its_checks_and_the_report_tells_of_the_process(disk: Path) -> None:
    report = disk.parent / "r.json"
    before = disk.read_bytes()

    done = command.run(
        "--private-mem", "--disk", f"{disk},process", "--report", str(report),
    )  # fmt: skip

    assert done.returncode == 0, done.stdout
    assert disk.read_bytes() == before
    counts = json.loads(report.read_text())["io"]["blk0"]
    assert counts["bytes_read"] > 64 << 10
    assert counts["requests"] > 5
    assert {**counts["process"], "pid": 0, "landlock": 0} == {
        "pid": 0, "deaths": 0, "restarts": 0, "last_end": None, "seccomp": True, "landlock": 0,
    }  # fmt: skip


def test_run_without_the_setting_loads_nothing_of_it(disk: Path) -> None:
    done = command.run(
        "--private-mem", "--disk", str(disk), "--policy", f"{ROOT}/tests/support/loaded.py:Loaded",
    )  # fmt: skip

    assert b"process modules: []" in done.stderr, done.stderr


class Guest:
    """The bench guest, whose disk is in a process, and its control socket."""

    def __init__(self, disk: Path, tests: str) -> None:
        self.control = disk.parent / "control"
        self.report = disk.parent / "r.json"
        self.process = subprocess.Popen(
            [*command.COMMAND, "--kernel", str(bench_guest()), "--mem", "128M",
             "--append", f"-- {tests}", "--disk", f"{disk},process", "--control",
             str(self.control), "--report", str(self.report)],
            env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "> bench guest\n"

    def ask(self, request: str, **more: object) -> dict[str, Any]:
        return ask(self.control, request, seconds=command.TIME_LIMIT, **more)

    def blk0(self) -> dict[str, Any]:
        counts: dict[str, Any] = self.ask("dump-state")["io"]["blk0"]
        return counts

    def until_moved(self, count: int) -> dict[str, Any]:
        """Wait until so many bytes more have been moved; the device's counts."""
        first = self.blk0()
        deadline = time.monotonic() + command.TIME_LIMIT
        while time.monotonic() < deadline:
            now = self.blk0()
            if now["bytes_read"] + now["bytes_written"] >= (
                first["bytes_read"] + first["bytes_written"] + count
            ):
                return now
        raise AssertionError(f"nothing moves: {first}")

    def end(self) -> dict[str, Any]:
        """Its standard error as "said" and its report."""
        _, said = self.process.communicate(timeout=command.TIME_LIMIT)
        report: dict[str, Any] = json.loads(self.report.read_text())
        return {"said": said, **report}


@pytest.fixture
def guest(disk: Path) -> Iterator[Guest]:
    made = Guest(disk, "rr4096x32n4000000")
    yield made
    made.process.kill()
    made.process.communicate()


def test_guest_sees_errors_when_the_process_is_killed_under_load(guest: Guest) -> None:
    """The bench guest gives up at the first request that fails, and powers off."""
    guest.until_moved(1 << 20)

    os.kill(guest.ask("devices")["devices"]["blk0"]["pid"], signal.SIGKILL)
    ended = guest.end()

    counts = ended["io"]["blk0"]
    assert ended["guest"]["exit"] == "poweroff"
    assert (counts["process"]["deaths"], counts["process"]["last_end"]) == (
        1, "was killed by SIGKILL",
    )  # fmt: skip
    assert 0 < counts["errors"] <= 32
    assert "ctl device restart blk0" in ended["said"]


def test_restart_under_load_in_the_sandbox_fails_no_request(guest: Guest) -> None:
    guest.until_moved(1 << 20)
    former = guest.ask("devices")["devices"]["blk0"]["pid"]

    done = subprocess.run(
        [*command.COMMAND, "ctl", str(guest.control), "device", "restart", "blk0"],
        env=_environment(), capture_output=True, timeout=command.TIME_LIMIT, check=False,
    )  # fmt: skip
    counts = guest.until_moved(1 << 20)
    refused = [guest.ask("restart-device", device=name)["error"] for name in ("blk7", "net0")]
    guest.ask("pause")
    refused.append(guest.ask("restart-device", device="blk0")["error"])
    guest.ask("quit")
    report = guest.end()

    assert done.returncode == 0, done.stderr
    process = counts["process"]
    assert process["pid"] != former
    assert (process["deaths"], process["restarts"]) == (0, 1)
    assert process["seccomp"]
    assert counts["errors"] == 0
    assert ["there is no device" in text for text in refused] == [True, True, False]
    assert "resume" in refused[2]
    assert report["io"]["blk0"]["process"]["restarts"] == 1


def test_process_that_stands_still_holds_nobody_else_up(guest: Guest) -> None:
    """Stopped, it answers nothing; the machine does."""
    guest.until_moved(1 << 20)
    os.kill(guest.ask("devices")["devices"]["blk0"]["pid"], signal.SIGSTOP)

    status = guest.ask("status")
    restarted = guest.ask("restart-device", device="blk0")
    guest.until_moved(1 << 20)

    assert status["ok"] and restarted["ok"]
    assert guest.blk0()["errors"] == 0
