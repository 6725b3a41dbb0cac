"""A run's ups and downs around real guests: power button, job control, idling."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import command, guests
from tests.support.command import Session

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

READY = b"ready\r\n"


def save(tmp_path: Path, code: bytes) -> list[str]:
    """Options for a kernel of `code`."""
    path = tmp_path / "kernel"
    path.write_bytes(guests.kernel(code))
    return ["--kernel", str(path), "--mem", "16M"]


def test_sigterm_presses_the_power_button_of_a_guest_that_listens(tmp_path: Path) -> None:
    with Session(save(tmp_path, guests.obey_power_button())) as session:
        session.expect(READY)

        session.process.send_signal(signal.SIGTERM)

        assert session.wait() == (0, "")
        assert session.modes() == session.modes_before


def test_second_sigterm_ends_a_guest_that_takes_its_time(tmp_path: Path) -> None:
    # It enables the event, and then does something else.
    enable = bytes.fromhex("66ba0206 66b80001 66ef")
    # The button's event reaches the guest; it says so: mov dx, 0x600; in ax, dx; test ah, 1; jz
    seen = bytes.fromhex("66ba0006 66ed f6c401 74f9")
    code = enable + guests.say(READY) + seen + guests.say(b"later\r\n") + guests.HALT
    with Session(save(tmp_path, code)) as session:
        session.expect(READY)
        session.process.send_signal(signal.SIGTERM)
        session.expect(b"later\r\n")

        session.process.send_signal(signal.SIGTERM)

        assert session.wait() == (1, "pyvmm: the run was stopped: received SIGTERM\n")


@pytest.mark.parametrize("controlling", [True, False])
def test_terminal_is_given_back_while_stopped_and_raw_again_afterwards(
    tmp_path: Path, controlling: bool
) -> None:
    options = save(tmp_path, guests.say(READY) + guests.echo())
    with Session([*options, "--cpus", "2"], controlling=controlling) as session:
        session.expect(READY)
        for _ in range(3):
            assert session.is_raw
            session.process.send_signal(signal.SIGTSTP)
            session.wait_until_stopped()
            assert session.modes() == session.modes_before

            session.process.send_signal(signal.SIGCONT)
            session.type(b"a")  # the guest answers in any case; the terminal echoes while cooked
            session.expect(b"a")
            while not session.is_raw:
                time.sleep(0.001)
            session.output = b""

        session.type(b"\x01x")
        assert session.wait() == (0, "")
        assert session.modes() == session.modes_before


class Rest(NamedTuple):
    """How often a thread gave up the processor by itself, and the system call that it is in."""

    switches: int
    call: list[int]
    """Number and arguments, see proc_pid_syscall(5); empty while it runs."""

    @property
    def is_long(self) -> bool:
        """Whether nothing but an event from outside the process ends it soon.

        What KVM keeps back of the serial port is looked after once a second in the end.
        """
        if self.call[:1] == [_EPOLL_WAIT]:
            return self.call[4] >= _LONG_MS
        # A vCPU that halted with its interrupts off.
        return self.call[:1] == [_IOCTL] and self.call[2] == _KVM_RUN


_IOCTL, _EPOLL_WAIT = 16, 232  # x86's numbers
_KVM_RUN = 0xAE80
_LONG_MS = 900  # or -1, without end, which is the largest there is


def threads_of(pid: int) -> dict[str, Rest]:
    """The threads of a process, but for KVM's own."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("kvm-"):
            continue
        fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        words = (task / "syscall").read_text().split()
        call = [int(word, 0) for word in words] if words != ["running"] else []
        found[task.name] = Rest(int(fields["voluntary_ctxt_switches"]), call)
    return found


def test_nothing_in_the_process_wakes_up_while_the_guest_idles(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 16))
    options = save(tmp_path, guests.say(READY) + guests.HALT)
    with Session([*options, "--cpus", "4", "--disk", str(disk)]) as session:
        session.expect(READY)
        before: dict[str, Rest] = {}
        threads = threads_of(session.process.pid)
        # The loop's thread and the vCPUs': seen twice in the same wait, all of them were in it at
        # one time, and nobody was left who could wake one. The session's watchdog ends this.
        while not (
            len(threads) == 5
            and threads == before
            and all(thread.is_long for thread in threads.values())
        ):
            assert session.process.poll() is None, f"never at rest: {threads}"
            before, threads = threads, threads_of(session.process.pid)

        session.type(b"\x01x")
        assert session.wait()[0] == 0


_SIGNALLED_AT_THE_END = """
import os, signal, sys
from vmm.cli.main import main
from vmm.machine import machine
build = machine.build_report
def build_report(**what):
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    return build(**what)
machine.build_report = build_report
sys.exit(main(["--private-mem", "--mem", "16M", "--report", sys.argv[1]]))
"""


def test_signals_after_the_guests_end_cost_no_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"

    done = subprocess.run(
        [sys.executable, "-c", _SIGNALLED_AT_THE_END, str(report)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["guest"]["exit"] == "poweroff"


def test_text_without_a_look_at_the_ports_status_costs_no_exit_a_byte(tmp_path: Path) -> None:
    """KVM keeps the bytes back; the exit that follows them, the reset, has them printed first."""
    report = tmp_path / "report.json"
    text = b"0123456789" * 30
    options = save(tmp_path, guests.say(text) + guests.RESET)

    done = command.run(*options, "--report", str(report))

    assert (done.returncode, done.stdout) == (0, text)
    ports = json.loads(report.read_text())["io_ports"]
    assert ports["0x64"] == 1
    assert ports.get("0x3f8", 0) < len(text) // 100
