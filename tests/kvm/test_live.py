"""A running machine from outside: control socket, SIGUSR1, status line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import command, guests
from tests.support.command import Session
from tests.support.control_client import ask

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

READY = b"ready\r\n"


@pytest.fixture
def echoing(tmp_path: Path) -> list[str]:
    """Options for a guest that says when it is ready and then echoes what is typed."""
    (tmp_path / "kernel").write_bytes(guests.kernel(guests.say(READY) + guests.echo()))
    return ["--kernel", str(tmp_path / "kernel"), "--mem", "16M"]


class Controlled(Session):
    """A session with a control socket."""

    def __init__(self, arguments: list[str], path: Path) -> None:
        super().__init__([*arguments, "--control", str(path)])
        self.path = path

    def await_listener(self) -> None:
        """The socket's file is there a moment before anybody listens on it."""
        with socket.socket(socket.AF_UNIX) as caller:
            while caller.connect_ex(str(self.path)):
                assert self.process.poll() is None

    def ask(self, request: str, **more: object) -> dict[str, Any]:
        return ask(self.path, request, seconds=command.TIME_LIMIT, **more)


@pytest.fixture
def session(echoing: list[str], tmp_path: Path) -> Iterator[Controlled]:
    with Controlled(echoing, tmp_path / "control") as made:
        made.expect(READY)
        yield made


def test_paused_guest_stands_still_and_goes_on_after_resume(session: Controlled) -> None:
    assert session.ask("pause") == {"ok": True}
    session.type(b"hello")
    before = session.ask("status")
    after = session.ask("status")

    assert before["state"] == "paused"
    assert before["exits"] == after["exits"] > 0
    os.set_blocking(session.master, False)
    with pytest.raises(BlockingIOError):
        os.read(session.master, 100)
    os.set_blocking(session.master, True)

    assert session.ask("resume") == {"ok": True}
    session.expect(b"hello")
    assert session.ask("status")["exits"] > after["exits"]


def test_quit_by_the_socket_ends_a_paused_run_and_its_file_goes(session: Controlled) -> None:
    session.ask("pause")

    assert session.ask("quit") == {"ok": True}

    assert session.wait() == (0, "")
    assert session.modes() == session.modes_before
    assert not session.path.exists()


@pytest.mark.parametrize("end", ["SIGTERM", "Ctrl-A x"])
def test_paused_run_can_be_ended_as_any_other(session: Controlled, end: str) -> None:
    session.ask("pause")

    if end == "SIGTERM":
        session.process.terminate()
    else:
        session.type(b"\x01x")

    assert session.wait()[0] == (1 if end == "SIGTERM" else 0)
    assert not session.path.exists()


def test_guest_started_paused_runs_nothing_until_it_is_resumed(
    echoing: list[str], tmp_path: Path
) -> None:
    with Controlled([*echoing, "-S"], tmp_path / "control") as session:
        session.await_listener()
        before = session.ask("status")
        assert (before["state"], before["exits"]) == ("paused", 0)

        assert session.ask("resume") == {"ok": True}

        session.expect(READY)
        assert session.ask("status")["state"] == "running"


@pytest.mark.parametrize("end", ["SIGTERM", "Ctrl-A x", "quit"])
def test_guest_that_was_never_resumed_can_be_ended(
    echoing: list[str], tmp_path: Path, end: str
) -> None:
    with Controlled([*echoing, "-S"], tmp_path / "control") as session:
        session.await_listener()
        assert session.ask("status")["state"] == "paused"

        if end == "SIGTERM":
            session.process.terminate()
        elif end == "quit":
            session.ask("quit")
        else:
            session.type(b"\x01x")

        assert session.wait()[0] == (1 if end == "SIGTERM" else 0)


def test_follower_hears_of_every_conversion_and_of_the_end(tmp_path: Path) -> None:
    path, report = tmp_path / "control", tmp_path / "report"
    with Controlled(["--private-mem", "-S", "--report", str(report)], path) as session:
        session.await_listener()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(command.TIME_LIMIT)
            connection.connect(str(path))
            connection.sendall(b'{"command": "follow"}\n')
            lines = connection.makefile("rb")
            assert json.loads(lines.readline()) == {"ok": True}
            session.ask("resume")
            events = [json.loads(line) for line in lines]
        assert session.wait()[0] == 0

    told = json.loads(report.read_text())["conversions"]
    assert [events[0]["event"], events[-1]["event"]] == ["resumed", "ended"]
    assert events[-1]["exit"] == "poweroff"
    for kind in ("share", "unshare"):
        assert sum(event["event"] == kind for event in events) == told[kind]["calls"] > 0
    assert {event["state"] for event in events if event["event"] == "state"} == {
        "shared", "private"
    }  # fmt: skip


def test_state_of_a_running_guest_is_dumped_whole(session: Controlled) -> None:
    session.type(b"up")  # what comes back has cost exits
    session.expect(b"up")

    state = session.ask("dump-state")

    assert state["pages"] == [[0, 16 << 20, "shared"]]
    assert state["residency"]["shared_bytes"] > 0
    assert state["exits"][0]["io"] > 0
    session.type(b"on")
    session.expect(b"on")


def test_conversion_that_cannot_be_is_an_error_and_the_guest_runs_on(session: Controlled) -> None:
    answer = session.ask("convert", kind="share", gpa="0x1000", size=4096)

    assert answer["ok"] is False and "ENOTSUP" in answer["error"]  # an ordinary VM
    session.type(b"on")
    session.expect(b"on")


def test_socket_that_is_in_use_is_refused_before_anything_runs(
    session: Controlled, echoing: list[str]
) -> None:
    done = command.run(*echoing, "--control", str(session.path))

    assert done.returncode == 2
    assert re.fullmatch(rb"pyvmm: --control .* where nothing is yet\n", done.stderr)
    assert session.ask("status")["ok"]


def test_sigusr1_prints_the_page_states_and_the_run_goes_on(session: Controlled) -> None:
    session.process.send_signal(signal.SIGUSR1)
    session.type(b"on")
    session.expect(b"on")
    session.ask("quit")

    status, said = session.wait()

    assert status == 0
    assert re.fullmatch(
        r"pyvmm: running for \d+\.\d s: 16\.0 MiB shared in 1 run; 0 conversions, 0 refused\n"
        r"pyvmm: \[#{64}\] 16\.0 MiB, .*\n",
        said,
    )


def test_status_on_the_guests_terminal_is_its_title(
    echoing: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shell = f'exec "$@" 2>&1 --status --control {tmp_path / "control"}'
    monkeypatch.setattr(command, "COMMAND", ("sh", "-c", shell, "sh", *command.COMMAND))

    with Session(echoing) as session:
        session.expect(READY)
        session.expect(b"\x1b]2;pyvmm: shared 16.0 MiB, private 0.0 MiB, 0 conversions/s")
        session.type(b"on")
        session.expect(b"on")
        session.type(b"\x01x")

        session.expect(b"\x1b[23;2t")  # the title of before
        assert session.wait() == (0, "")


def test_sigusr1_before_and_after_the_guest_runs_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(
        "import os, signal\n"
        "from vmm.policy import Allow, Policy\n"
        "class Asking(Policy):\n"
        "    def on_boot(self, view):\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "        return Allow()\n"
        "    def on_exit(self, end, view):\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
    )

    done = command.run("--private-mem", "--policy", f"{tmp_path / 'p.py'}:Asking")

    assert (done.returncode, done.stderr) == (0, b"")
