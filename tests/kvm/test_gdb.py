"""Guests under real gdb, and under a client that does what gdb wouldn't.

The host may interpret kernel mode, whose instructions it steps over all the same; what its KVM
can't do for a debugger is said at the start, and these tests do without.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings.x86_64 import System
from tests.support import command, guests
from tests.support.command import Session
from tests.support.gdb_client import GENERAL, GdbClient, gdb
from vmm.arch import architecture

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

NOPS = b"\x90" * 4
INCREMENTS = b"\x48\xff\xc0" * 3  # inc rax
STORE = b"\x48\x89\x04\x25\x00\x00\x30\x00"  # mov [0x300000], rax
SAID = b"hello\r\n"
CODE = NOPS + INCREMENTS + STORE + guests.say(SAID) + guests.echo()
AFTER_INCREMENTS = guests.BASE + len(NOPS + INCREMENTS)
AFTER_STORE = AFTER_INCREMENTS + len(STORE)


@pytest.fixture(scope="module", autouse=True)
def steps_in_kernel_mode(kvm: System) -> None:
    able = architecture().debug(kvm).abilities
    if not (able.kernel_steps and able.kernel_hardware):
        pytest.skip(f"this host's KVM has no {able.lacking()}")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "kernel").write_bytes(guests.kernel(CODE))
    return ["--kernel", str(tmp_path / "kernel"), "--mem", "16M"]


@contextmanager
def debugged(options: list[str], path: Path) -> Iterator[Session]:
    """A run whose guest waits for a debugger at `path`."""
    with Session([*options, "--gdb", str(path)]) as session:
        assert session.process.stderr is not None
        while b"waits for a debugger" not in session.process.stderr.readline():
            assert session.process.poll() is None
        yield session


def report(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_gdb_steps_stops_looks_and_lets_go(options: list[str], tmp_path: Path) -> None:
    path, written = tmp_path / "gdb", tmp_path / "report"
    with debugged([*options, "--cpus", "2", "--report", str(written)], path) as session:
        said = gdb(
            str(path),
            "info threads",
            'printf "at %#lx\\n", $rip',
            "stepi",
            "stepi",
            'printf "at %#lx\\n", $rip',
            f"hbreak *{AFTER_INCREMENTS:#x}",
            "continue",
            'printf "rax %d\\n", $rax',
            "set $rax = 0x41",
            "delete",
            f"hbreak *{AFTER_STORE:#x}",
            "continue",
            "x/1gx 0x300000",
            "set {long}0x300008 = 0x1122334455667788",
            "x/1gx 0x300008",
            'printf "cr0 %#lx\\n", $cr0',
            "x/1bx 0xf0000000",
            "monitor why",
            "detach",
        )
        session.expect(SAID)
        session.type(b"x")
        session.expect(b"x")
        session.type(b"\x01x")
        status, _ = session.wait()

    assert re.search(r"Thread 1 \(vCPU 0\).*\n.*Thread 2 \(vCPU 1\)", said), said
    assert f"at {guests.BASE:#x}\n" in said and f"at {guests.BASE + 2:#x}\n" in said
    assert "rax 3\n" in said
    assert "0x300000:\t0x0000000000000041" in said
    assert "0x300008:\t0x1122334455667788" in said
    assert "cr0 0x80" in said
    assert "Cannot access memory at address 0xf0000000" in said
    assert "GPA 0xf0000000 is no RAM" in said
    assert "detached" in said
    assert status == 0
    counts = report(written)["gdb"]
    assert counts["attached"] == 1 and counts["stops"] >= 4
    assert counts["refused"] == {"reads": 1, "writes": 0}
    assert counts["private_bytes"] == 0 and counts["sees_private"] is False


def test_breakpoint_works_with_whatever_this_kvm_has(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    with debugged(options, path) as session:
        said = gdb(
            str(path),
            f"break *{AFTER_INCREMENTS:#x}",
            "continue",
            f"x/2bx {AFTER_INCREMENTS:#x}",
            "stepi",
            'printf "at %#lx\\n", $rip',
            "kill",
        )
        status, _ = session.wait()

    assert f"Breakpoint 1, {AFTER_INCREMENTS:#018x}" in said
    assert f"{AFTER_INCREMENTS:#x}:\t0x48\t0x89" in said, "the breakpoint itself doesn't show"
    assert f"at {AFTER_STORE:#x}\n" in said
    assert status == 0


def test_interrupt_finds_a_running_guest_and_it_goes_on(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    with debugged(options, path) as session, GdbClient.at(path) as client:
        client.send(b"vCont;c")
        session.expect(SAID)

        client.raw(b"\x03")
        assert client.reply().startswith(b"T02")
        first = client.registers(GENERAL)
        session.type(b"y")
        assert client.registers(GENERAL) == first
        client.send(b"vCont;c")

        session.expect(b"y")
        assert guests.BASE <= first["rip"] < guests.BASE + 4096


def test_guest_goes_on_where_its_debugger_dies(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    with debugged(options, path) as session:
        with GdbClient.at(path) as client:
            assert client.ask(b"Z1,%x,1" % AFTER_STORE) == b"OK"
            assert b"hwbreak" in client.ask(b"vCont;c")

        session.expect(SAID)


def test_port_takes_gdb_too(options: list[str]) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with Session([*options, "--gdb", port]) as session:
        assert session.process.stderr is not None
        while b"target remote :" not in session.process.stderr.readline():
            assert session.process.poll() is None

        said = gdb(f":{port}", 'printf "at %#lx\\n", $rip', "detach")
        session.expect(SAID)

    assert f"at {guests.BASE:#x}\n" in said


def test_control_socket_ends_a_run_whose_guest_stands_still(
    options: list[str], tmp_path: Path
) -> None:
    control, path = tmp_path / "control", tmp_path / "gdb"
    with (
        debugged([*options, "--control", str(control)], path) as session,
        GdbClient.at(path) as client,
    ):
        assert client.ask(b"?")
        status = command.run("ctl", str(control), "status")
        assert json.loads(status.stdout)["state"] == "debugged"

        assert command.run("ctl", str(control), "quit").returncode == 0

        assert session.wait()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_run_whose_guest_never_started(
    options: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    with debugged(options, tmp_path / "gdb") as session:
        session.process.send_signal(number)

        assert session.wait()[0] == 1
    assert not (tmp_path / "gdb").exists()


def test_end_of_the_guest_is_told(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(guests.kernel(guests.RESET))
    path = tmp_path / "gdb"
    with debugged(["--kernel", str(tmp_path / "kernel"), "--mem", "16M"], path) as session:
        said = gdb(str(path), "continue")
        assert session.wait()[0] == 0

    assert "exited normally" in said


# -- private memory -------------------------------------------------------------------------------

PAYLOAD_PRIVATE = 0x20_0000


@pytest.mark.parametrize("sees", [False, True])
def test_private_page_is_an_error_in_gdb_unless_the_rehearsal_shows_it(
    tmp_path: Path, sees: bool
) -> None:
    written, path = tmp_path / "report", tmp_path / "gdb"
    options = ["--private-mem=memfd", "--report", str(written)]
    with debugged([*options, *(["--gdb-sees-private"] if sees else [])], path) as session:
        said = gdb(
            str(path),
            "monitor physical on",
            f"monitor states {PAYLOAD_PRIVATE:#x}",
            f"x/2gx {PAYLOAD_PRIVATE:#x}",
            f"set {{long}}{PAYLOAD_PRIVATE:#x} = 1",
            "x/1bx 0x100000",
            "kill",
        )
        assert session.wait()[0] == 0

    assert f"{PAYLOAD_PRIVATE:#x} 0x1000 private" in said
    assert re.search(r"0x100000.*:\t0x", said), "shared memory is served in either case"
    shown = re.search(rf"{PAYLOAD_PRIVATE:#x}:\t0x0", said)
    refused = f"Cannot access memory at address {PAYLOAD_PRIVATE:#x}" in said
    assert (bool(shown), refused) == (sees, not sees), said
    counts = report(written)["gdb"]
    assert counts["sees_private"] is sees
    assert bool(counts["private_bytes"]) is sees
    assert (counts["refused"]["reads"] > 0) is not sees
    assert (counts["refused"]["writes"] > 0) is not sees


def test_private_memory_that_the_kernel_keeps_is_not_to_be_seen(tmp_path: Path) -> None:
    done = command.run(
        "--private-mem=guest_memfd", "--gdb", str(tmp_path / "gdb"), "--gdb-sees-private"
    )

    if done.returncode == 3:
        pytest.skip(done.stderr.decode())
    assert done.returncode == 2
    assert done.stderr.count(b"\n") <= 2
    assert b"--gdb-sees-private" in done.stderr and b"guest_memfd" in done.stderr


def test_step_that_would_be_the_guests_end_is_refused(kvm: System, tmp_path: Path) -> None:
    if architecture().debug(kvm).abilities.user_steps:
        pytest.skip("this host's KVM steps in user mode, too")
    path = tmp_path / "gdb"
    with debugged(["--private-mem"], path) as session:
        with GdbClient.at(path) as client:
            assert b"single step" in client.ask(b"vCont;s:1")
            assert client.ask(b"D") == b"OK"

        session.expect(b"checks passed")
        assert session.wait()[0] == 0


# -- bad usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--gdb", "0"], b"1 to 65535"),
        (["--gdb", "70000"], b"1 to 65535"),
        (["--gdb", "/no/such/folder/gdb"], b"cannot listen"),
        (["--gdb="], b"--gdb"),
        (["--gdb-sees-private"], b"needs --gdb"),
        (["--gdb", "1234", "--gdb-sees-private"], b"needs --private-mem"),
    ],
)
def test_bad_option_is_one_line_and_status_2(words: list[str], what: bytes) -> None:
    done = command.run(*words)

    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and what in done.stderr


def test_socket_of_a_killed_run_is_replaced(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    with debugged([*options, "--sandbox=off"], path) as session:
        session.process.kill()
        assert session.wait()[0] == -signal.SIGKILL
    assert path.exists(), "a process outside the sandbox would have removed it"

    with debugged(options, path), GdbClient.at(path) as client:
        assert client.ask(b"?").startswith(b"T05")
