"""The command around real guests: terminal, signals, Ctrl-A, pipes that close, ways to end."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import termios
import threading
from array import array
from pathlib import Path

import pytest

from tests.support import command, guests
from tests.support.command import Session

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

READY = b"ready\r\n"
COALESCED_BYTES = 169
"""What KVM keeps back at most before a write exits: a page of entries of 24 bytes, but one."""


def save(tmp_path: Path, code: bytes) -> str:
    """Write a kernel of `code`; its path."""
    path = tmp_path / "kernel"
    path.write_bytes(guests.kernel(code))
    return str(path)


@pytest.fixture
def echoing(tmp_path: Path) -> list[str]:
    """Options for a guest that says when it is ready and then echoes what is typed."""
    return ["--kernel", save(tmp_path, guests.say(READY) + guests.echo()), "--mem", "16M"]


# -- a terminal -----------------------------------------------------------------------------------


def test_guest_on_a_terminal_gets_keys_raw_and_answers(echoing: list[str]) -> None:
    with Session(echoing) as session:
        session.expect(READY)

        session.type(b"a\x03\x1a\x04z")
        session.expect(b"a\x03\x1a\x04z")

        assert session.is_raw


@pytest.mark.parametrize("key", [b"x", b"X"])
def test_ctrl_a_x_quits_with_status_0_and_restores_the_terminal(
    echoing: list[str], key: bytes
) -> None:
    with Session(echoing) as session:
        session.expect(READY)

        session.type(b"\x01" + key)

        assert session.wait() == (0, "")
        assert session.modes() == session.modes_before


def test_ctrl_a_twice_sends_it_and_ctrl_a_h_helps(echoing: list[str]) -> None:
    with Session(echoing) as session:
        session.expect(READY)

        session.type(b"<\x01\x01>")
        session.expect(b"<\x01>")
        session.type(b"\x01h")
        session.expect(b"Ctrl-A x  quit")

        session.type(b"\x01x")
        assert session.wait() == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signal_stops_the_run_and_restores_the_terminal(
    echoing: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    report = tmp_path / "r.json"
    with Session([*echoing, "--report", str(report)]) as session:
        session.expect(READY)

        session.process.send_signal(number)

        line = f"pyvmm: the run was stopped: received {number.name}\n"
        assert session.wait() == (1, line)
        assert session.modes() == session.modes_before
    assert json.loads(report.read_text())["guest"]["exit"] == "stopped"


def test_ignored_hangup_stays_ignored(echoing: list[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        session = Session(echoing)
    finally:
        signal.signal(signal.SIGHUP, before)
    with session:
        session.expect(READY)

        session.process.send_signal(signal.SIGHUP)
        session.type(b"alive")
        session.expect(b"alive")


RAISING = """
from vmm.policy import Policy
class Raising(Policy):
    def on_share(self, event, view):
        raise RuntimeError("a policy's own fault")
"""


def test_policy_that_raises_ends_the_run_and_only_its_own_code_is_shown(tmp_path: Path) -> None:
    path, report = tmp_path / "p.py", tmp_path / "r.json"
    path.write_text(RAISING)
    arguments = ["--private-mem", "--policy", f"{path}:Raising", "--report", str(report)]

    with Session(arguments) as session:
        status, said = session.wait()

        assert status == 1
        shown = re.fullmatch(
            r"  event: share \[0x\w+, 0x\w+\), \d+ KiB, by vCPU 0, port\n"
            r"Traceback .*\n"
            rf'  File "{path}", line 5, in on_share\n(?:    .*\n)+'
            r"RuntimeError: a policy's own fault\n"
            r"pyvmm: policy Raising: on_share for \[.*\) raised RuntimeError.*\n",
            said,
        )
        assert shown, said
        assert session.modes() == session.modes_before
    assert json.loads(report.read_text())["guest"]["exit"] == "policy-error"


def test_debug_shell_opens_where_a_policy_raised(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(RAISING)
    spec = f"{tmp_path / 'p.py'}:Raising"
    with Session(["--private-mem", "--policy", spec, "--debug-shell"]) as session:
        session.expect(b">>> ")
        assert not session.is_raw

        session.type(b"print(event.kind, policy, view.ram_bytes >> 20, [exception], local)\n")
        session.expect(b"512 [RuntimeError")
        session.output = session.output.partition(b"512 [RuntimeError")[2]
        session.expect(b">>> ")  # the next: an end of file typed before it would be lost
        session.type(b"\x04")

        status, said = session.wait()
        assert status == 1
        assert session.modes() == session.modes_before
        assert said.index("in on_share") < said.index("pyvmm: policy Raising")


def test_debug_shell_that_is_left_with_exit_does_not_change_the_status(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(RAISING)
    spec = f"{tmp_path / 'p.py'}:Raising"
    with Session(["--private-mem", "--policy", spec, "--debug-shell"]) as session:
        session.expect(b">>> ")

        session.type(b"exit(0)\n")

        assert session.wait()[0] == 1


IO = """
import os
from vmm.policy import Deny, Kill, Policy
class Raising(Policy):
    def on_io(self, event, view):
        raise OSError(5, "mine")
class Killing(Policy):
    def on_io(self, event, view):
        return Kill("hands off")
class Spinning(Policy):
    def on_io(self, event, view):
        os.write(1, b"asked")
        while True:
            pass
"""


@pytest.fixture
def io_policies(tmp_path: Path) -> list[str]:
    """Options for a payload with a disk, up to the file of the policy."""
    (tmp_path / "p.py").write_text(IO)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    disk = ["--disk", str(tmp_path / "disk")]
    return ["--private-mem", "--mem", "64M", *disk, "--policy", str(tmp_path / "p.py")]


def test_policy_that_raises_when_a_device_asks_ends_the_run(io_policies: list[str]) -> None:
    *options, policy = io_policies

    done = command.run(*options, f"{policy}:Raising")

    assert done.returncode == 1
    assert re.search(
        rb"  event: blk0 reads \[0x\w+, 0x\w+\), 4 bytes, named by a ring", done.stderr
    )
    assert re.search(rb"pyvmm: policy Raising: on_io for .* raised OSError.*\n\Z", done.stderr)


def test_policy_may_end_the_run_when_a_device_asks(io_policies: list[str]) -> None:
    *options, policy = io_policies

    done = command.run(*options, f"{policy}:Killing")

    line = b"pyvmm: the run was ended: policy Killing: hands off\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_on_io_that_never_returns_does_not_keep_a_signal_from_ending_the_run(
    io_policies: list[str],
) -> None:
    *options, policy = io_policies
    with Session([*options, f"{policy}:Spinning"]) as session:
        session.expect(b"asked")

        session.process.terminate()

        assert session.wait() == (1, "pyvmm: the run was stopped: received SIGTERM\n")
        assert session.modes() == session.modes_before


def test_least_privilege_lets_the_payloads_disk_work(io_policies: list[str]) -> None:
    done = command.run(*io_policies[:-1], "vmm.policy.builtin:LeastPrivilege")

    assert re.search(rb"ok \d+ disk", done.stdout)
    assert done.returncode == 0


def test_policy_that_exits_is_blamed_like_one_that_raises(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(RAISING.replace("raise RuntimeError", "raise SystemExit"))

    done = command.run("--private-mem", "--policy", f"{tmp_path / 'p.py'}:Raising")

    assert re.search(rb"pyvmm: policy Raising: .* raised SystemExit.*\n\Z", done.stderr)
    assert done.returncode == 1


# -- stdin and stdout that are no terminal --------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_input_reaches_the_guest_whole(echoing: list[str], tmp_path: Path, kind: str) -> None:
    text = bytes(range(256)) * 16
    (tmp_path / "input").write_bytes(text)
    read_end, write_end = os.pipe()
    stdin = read_end if kind == "pipe" else os.open(tmp_path / "input", os.O_RDONLY)
    with subprocess.Popen(
        [*command.COMMAND, *echoing],
        cwd=command.ROOT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        watchdog = threading.Timer(command.TIME_LIMIT, process.kill)
        watchdog.start()
        if kind == "pipe":
            os.write(write_end, text)
        assert process.stdout is not None

        seen = process.stdout.read(len(READY + text))

        process.terminate()
        process.communicate()
        watchdog.cancel()
    for fd in {stdin, read_end, write_end}:
        os.close(fd)
    assert seen == READY + text


def test_stdout_that_closes_does_not_disturb_the_guest() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)

    done = command.run("--private-mem", stdout=write_end)

    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_stdout_on_a_full_disk_is_told_and_does_not_disturb_the_guest() -> None:
    with open("/dev/full", "wb") as full:
        done = command.run("--private-mem", stdout=full)

    assert done.returncode == 0
    assert done.stderr == b"pyvmm: console output is lost from here on: No space left on device\n"


def test_signal_ends_a_guest_whose_output_nobody_reads(tmp_path: Path) -> None:
    kernel = save(tmp_path, guests.chatter())
    read_end, write_end = os.pipe()
    capacity = fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen(
        [*command.COMMAND, "--kernel", kernel, "--mem", "16M"],
        cwd=command.ROOT,
        stdin=subprocess.DEVNULL,
        stdout=write_end,
        stderr=subprocess.PIPE,
    ) as process:
        watchdog = threading.Timer(command.TIME_LIMIT, process.kill)
        watchdog.start()
        filled = array("i", [0])
        # A pipe takes a write of that many bytes as a whole or has it wait.
        while filled[0] <= capacity - COALESCED_BYTES and process.poll() is None:
            fcntl.ioctl(read_end, termios.FIONREAD, filled)

        process.terminate()
        _, said = process.communicate()
        watchdog.cancel()
    os.close(read_end)
    os.close(write_end)
    assert said == b"pyvmm: the run was stopped: received SIGTERM\n"
    assert process.returncode == 1


def test_closed_stdin_and_stdout_leave_a_disk_alone(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    content = bytes(range(256)) * 256
    disk.write_bytes(content)
    shell = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command.COMMAND, "--disk", str(disk)]

    done = subprocess.run(
        shell, cwd=command.ROOT, timeout=command.TIME_LIMIT, capture_output=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert disk.read_bytes() == content


def test_initrd_is_where_boot_params_say(tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(b"first file of the initrd\r\n" * 50)
    kernel = save(tmp_path, guests.print_initrd() + guests.RESET)

    done = command.run("--kernel", kernel, "--initrd", str(tmp_path / "initrd"), "--mem", "16M")

    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (tmp_path / "initrd").read_bytes()


# -- the ways in which a guest ends ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "line", "exit"),
    [
        (guests.say(b"bye\r\n") + guests.RESET, 0, "", "reset"),
        (guests.CRASH, 1, "pyvmm: the guest crashed: triple fault on vCPU 0\n", "triple-fault"),
        (
            guests.say(b"[1.0] Kernel panic - not syncing: no init\r\nCPU: 0\r\n") + guests.RESET,
            1,
            "pyvmm: the guest panicked: Kernel panic - not syncing: no init\n",
            "panic",
        ),
        (
            guests.say(b"Kernel panic - not syncing: old\r\nreboot: Restarting system\r\n")
            + guests.RESET,
            0,
            "",
            "reset",
        ),
    ],
    ids=["reset", "triple fault", "panic", "orderly reboot"],
)
def test_end_of_a_guest_has_its_status_line_and_report(
    tmp_path: Path, code: bytes, status: int, line: str, exit: str
) -> None:
    report = tmp_path / "r.json"

    done = command.run(
        "--kernel", save(tmp_path, code), "--mem", "16M", "--report", str(report)
    )  # fmt: skip

    assert (done.returncode, done.stderr.decode()) == (status, line)
    assert json.loads(report.read_text())["guest"]["exit"] == exit


# -- devices that the payload has no driver for ----------------------------------------------------


def test_payload_runs_beside_every_device_and_nothing_is_left_of_them(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    report = tmp_path / "report.json"

    done = command.run(
        "--private-mem", "--disk", f"{tmp_path / 'disk'},queues=2", "--rng",
        "--vsock", f"path={tmp_path / 'v'}", "--console", f"socket={tmp_path / 'c'}",
        "--console", f"file={tmp_path / 'out'},name=port", "--balloon", f"control={tmp_path / 'b'}",
        "--report", str(report),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert re.search(rb"ok \d+ disk", done.stdout)
    io = json.loads(report.read_text())["io"]
    assert list(io) == ["blk0", "vsock", "console", "rng", "balloon"]
    assert io["blk0"]["bytes_read"] > 0 and io["blk0"]["errors"] == 0
    assert sorted(os.listdir(tmp_path)) == ["disk", "out", "report.json"]
