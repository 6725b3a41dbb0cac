"""A run's ups and downs around real guests: power button, job control, idling."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def switches(pid: int) -> dict[str, int]:
    """How often each thread of a process gave up the processor by itself, but for KVM's own."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("kvm-"):
            continue
        fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        found[task.name] = int(fields["voluntary_ctxt_switches"])
    return found


def test_nothing_in_the_process_wakes_up_while_the_guest_idles(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 16))
    options = save(tmp_path, guests.say(READY) + guests.HALT)
    with Session([*options, "--cpus", "4", "--disk", str(disk)]) as session:
        session.expect(READY)
        samples = [switches(session.process.pid)]
        while len(samples) < 20 and (len(samples[-1]) < 5 or samples[-1] not in samples[:-1]):
            # In which nothing is to happen, once the threads have started: what KVM keeps back is
            # looked after once a second.
            time.sleep(0.3)
            samples.append(switches(session.process.pid))

        assert samples[-1] == samples[-2]
        assert len(samples[-1]) == 5  # the loop's thread and the vCPUs'
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
