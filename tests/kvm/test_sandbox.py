"""The sandbox around a run: what hostile code in it can't do, and that all the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import vmm
from kvm_bindings import sandbox
from tests.support import command
from tests.support.other_user import open_to_others

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

ROOT = Path(__file__).resolve().parents[2]
POLICY = f"{ROOT}/tests/support/hostile_policy.py:Hostile"
MUST_WORK = {"a thread", "a module of Python's", "a compiled module", "a pipe", "time", "random"}
needs_landlock = pytest.mark.skipif(
    sandbox.landlock_version() == 0, reason="this kernel has no Landlock, or it is switched off"
)

REAPER = """
import ctypes, os, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
status = subprocess.run(sys.argv[1:]).returncode
try:
    while True:
        os.wait()
except ChildProcessError:
    print(status)
"""
"""Runs a command and waits for the processes that it leaves behind, too."""

TAKEN_OVER = """
import json, sys
from tests.support import hostile_policy
from vmm.cli import report
summarise = report.summarise
def hostile(trace):
    ended = hostile_policy.attempt_all()
    print("attempts:" + json.dumps(ended), file=sys.stderr, flush=True)
    return summarise(trace)
report.summarise = hostile
import runpy
runpy.run_module("vmm", run_name="__main__", alter_sys=True)
"""
"""`pyvmm` whose reader of traces makes the attempts."""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _run(
    folder: Path, *options: str, opening: Sequence[str] = ()
) -> tuple[subprocess.CompletedProcess[bytes], dict[str, str]]:
    (folder / "secret.txt").write_text("secret")
    (folder / "allowed").mkdir()
    with (folder / "disk.img").open("wb") as disk:
        disk.truncate(1 << 20)
    done = command.run(
        "--private-mem", "--disk", "disk.img", "--policy", POLICY, "--report", "r.json", *options,
        before=opening, cwd=folder, env=_environment(),
    )  # fmt: skip
    told = next(line for line in done.stderr.splitlines() if line.startswith(b"attempts:"))
    return done, json.loads(told.removeprefix(b"attempts:"))


def _report(folder: Path) -> Any:
    return json.loads((folder / "r.json").read_text())


@needs_landlock
def test_hostile_policy_is_refused_everything_and_the_run_goes_on(tmp_path: Path) -> None:
    done, ended = _run(tmp_path)

    assert done.returncode == 0, done.stderr
    # A memfd has no path for Landlock, and root minds no mode: --uid.
    left = {"open guest memory again"} if os.geteuid() == 0 else set()
    assert {name for name, how in ended.items() if how == "ok"} == MUST_WORK | left
    assert set(ended.values()) <= {"ok", "EPERM", "EACCES"}
    assert (tmp_path / "secret.txt").read_text() == "secret"
    found = _report(tmp_path)["sandbox"]
    assert found["seccomp"] is True
    assert found["landlock"] == sandbox.landlock_version()


def test_hostile_policy_without_a_sandbox_is_refused_nothing_of_that(tmp_path: Path) -> None:
    """The attempts are real ones: all that a user may do ends well."""
    _, ended = _run(tmp_path, "--sandbox=off")

    assert {name: how for name, how in ended.items() if how != "ok"} == {
        "exec": "ENOENT",
        "rename a file": "ENOENT",  # it was removed before
        "ptrace": "ESRCH",
        "type on the terminal": "ENOTTY",
        "change root": "ENOENT" if os.geteuid() == 0 else "EPERM",
    }
    assert "sandbox" not in _report(tmp_path)


@needs_landlock
def test_allowed_path_can_be_written_and_nothing_beside_it(tmp_path: Path) -> None:
    done, ended = _run(tmp_path, "--allow-path", "allowed")

    assert done.returncode == 0, done.stderr
    assert ended["allowed file"] == "ok"
    assert {ended["write a file here"], ended["remove a file"], ended["read a file here"]} == {
        "EACCES"
    }
    assert (tmp_path / "allowed" / "file.txt").exists()
    assert _report(tmp_path)["sandbox"]["paths"] == ["allowed"]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
ANOTHER = 54321
BECOME = ["setpriv", f"--reuid={ANOTHER}", "--clear-groups"]
WHO = """
import glob, json, os, sys
from vmm.policy import Allow, Policy
class Who(Policy):
    asked = False
    def on_share(self, event, view):
        if self.asked:
            return Allow()
        self.asked = True
        lines = [line.split() for name in glob.glob("/proc/self/task/*/status")
                 for line in open(name) if line.startswith(("Uid", "Gid", "Groups", "CapEff"))]
        core = next(line.split()[-3:-1] for line in open("/proc/self/limits") if "core" in line)
        print("who:" + json.dumps([core, *lines]), file=sys.stderr, flush=True)
        return Allow()
"""


@needs_root
@pytest.mark.parametrize("sandboxed", ["auto", "off"])
def test_all_threads_become_the_user_and_what_the_run_leaves_is_complete(
    tmp_path: Path, sandboxed: str
) -> None:
    (tmp_path / "who.py").write_text(WHO)
    user = str(ANOTHER)

    with open_to_others() as opening:
        done = subprocess.run(
            [*opening, *command.COMMAND, "--private-mem", "--policy", "who.py:Who",
             "--uid", f"{user}:{user}", "--trace", "trace", "--report", "r.json",
             "--control", "control", f"--sandbox={sandboxed}"],
            cwd=tmp_path, env=_environment(), capture_output=True, timeout=60, check=False,
            extra_groups=[ANOTHER + 1],
        )  # fmt: skip

    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stderr.splitlines() if line.startswith(b"who:"))
    core, *lines = json.loads(told.removeprefix(b"who:"))
    assert core == ["0", "0"] or sandboxed == "off"
    assert len(lines) >= 2 * 4, "a vCPU's thread and the main one"
    assert {tuple(line) for line in lines} == {
        ("Uid:", *[user] * 4), ("Gid:", *[user] * 4), ("Groups:",), ("CapEff:", "0" * 16),
    }  # fmt: skip
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}  # of the policy
    assert left == {"r.json", "trace", "who.py"}
    assert (tmp_path / "trace").stat().st_uid == ANOTHER
    assert (tmp_path / "r.json").stat().st_uid == 0, "by the process outside"


@needs_root
@needs_landlock
def test_another_user_opens_guest_memory_and_the_disk_no_second_time() -> None:
    """Started in a folder that this user can find, and not enter."""
    with tempfile.TemporaryDirectory() as folder, open_to_others() as opening:
        _, ended = _run(Path(folder), "--uid", f"{ANOTHER}:{ANOTHER}", opening=opening)

    assert ended["open guest memory again"] == "EACCES"
    assert {name for name, how in ended.items() if how == "ok"} == MUST_WORK


@needs_root
def test_machine_in_a_program_becomes_no_other_user() -> None:
    config = vmm.MachineConfig(private_memory="memfd", user="nobody")

    with (
        pytest.raises(vmm.UsageError, match="user: all threads of your program"),
        vmm.Machine(config) as machine,
    ):
        machine.start()


def test_uid_without_the_right_to_it_is_one_line_and_status_3(tmp_path: Path) -> None:
    with open_to_others() as opening:
        words = [*opening, *(BECOME if os.geteuid() == 0 else [])]
        done = subprocess.run(
            [*words, *command.COMMAND, "--private-mem", "--uid", "nobody"],
            cwd="/", env=_environment(), capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    assert done.returncode == 3, done.stderr
    assert b"may not become another user (CAP_SETUID, CAP_SETGID)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_run_with_every_output_leaves_them_and_removes_its_sockets(tmp_path: Path) -> None:
    done = command.run(
        "--private-mem", "--report", "r.json", "--trace", "trace", "--control", "control",
        "--vsock", "path=vsock", "--console", "socket=console", "--console", "file=log",
        "--balloon", "control=balloon",
        cwd=tmp_path, env=_environment(),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "r.json", "trace"]
    read = command.run("report", "trace", cwd=tmp_path, env=_environment())
    assert read.returncode == 0, read.stderr


def test_killed_run_leaves_no_socket_behind(tmp_path: Path) -> None:
    """By the process outside, which notices that the run has let go of it."""
    (tmp_path / "stop.py").write_text(
        "import os, signal\n"
        "from vmm.policy import Policy\n"
        "class Stop(Policy):\n"
        "    def on_share(self, event, view):\n"
        "        signal.raise_signal(signal.SIGKILL)\n"
    )
    options = ["--control", "control", "--vsock", "path=vsock", "--policy", "stop.py:Stop"]

    done = subprocess.run(
        [sys.executable, "-c", REAPER, *command.COMMAND, "--private-mem", *options],
        cwd=tmp_path, env=_environment(), capture_output=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.stdout.splitlines()[-1] == b"-9", done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_socket()) == []


def test_policy_that_wants_what_is_refused_is_told_how_to_get_it_back(tmp_path: Path) -> None:
    (tmp_path / "log.py").write_text(
        "from vmm.policy import Policy\n"
        "class Log(Policy):\n"
        "    def on_share(self, event, view):\n"
        "        open('log.txt', 'w')\n"
    )

    done = command.run("--private-mem", "--policy", "log.py:Log", cwd=tmp_path, env=_environment())

    assert done.returncode == 1
    assert b"--allow-path PATH gives a file or folder back" in done.stderr
    assert b"log.py" in done.stderr


def test_earlier_report_goes_when_the_new_one_is_there(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("earlier")

    done = command.run("--private-mem", "--report", "r.json", cwd=tmp_path, env=_environment())

    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json"]
    assert _report(tmp_path)["guest"]["exit"] == "poweroff"


@needs_landlock
@pytest.mark.parametrize("view", [[], ["--html", "views/a.html"], ["--plots", "views"]])
def test_reading_a_trace_reaches_nothing_but_it_and_its_views(
    tmp_path: Path, view: list[str]
) -> None:
    """What a hostile trace would have to make the reader do, done by the reader itself."""
    (tmp_path / "views").mkdir()
    made = command.run("--private-mem", "--trace", "trace", cwd=tmp_path, env=_environment())
    assert made.returncode == 0, made.stderr

    done = subprocess.run(
        [sys.executable, "-c", TAKEN_OVER, "report", "trace", *view],
        cwd=tmp_path, env=_environment(), capture_output=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stderr.splitlines() if line.startswith(b"attempts:"))
    ended = json.loads(told.removeprefix(b"attempts:"))
    # What is there of a run is not: a disk and guest memory.
    of_a_run = {"map the disk", "map the disk privately", "map guest memory", "copy a descriptor",
                "open the disk again", "open guest memory again"}  # fmt: skip
    worked = {name for name, how in ended.items() if how == "ok"} - of_a_run
    assert worked == MUST_WORK
    assert list((tmp_path / "views").iterdir()) != [] or view == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sandbox=yes"], "--sandbox=yes is unknown; use auto, on, off"),
        (["--allow-path", "nowhere"], "--allow-path nowhere: there is no such file or folder"),
        (["--allow-path", ".", "--sandbox=off"], "nothing is out of reach with --sandbox=off"),
        (["--uid", "no-such-user"], "there is no user 'no-such-user'"),
        (["--uid", "nobody:no-such-group"], "there is no group 'no-such-group'"),
        (["--uid", "12"], "a number needs its group, as in 12:12"),
        (["--uid", "root"], "that is root, who keeps every right"),
        (["--uid", "4294967295:1"], "4294967295 is no user's number"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(
    tmp_path: Path, options: list[str], said: str
) -> None:
    done = command.run("--private-mem", *options, cwd=tmp_path, env=_environment())

    assert done.returncode == 2
    assert said in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
