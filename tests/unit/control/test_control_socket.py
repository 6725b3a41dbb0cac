"""The control socket: its file, its commands, and clients that don't mean well."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.control import Server, line
from vmm.control.control_socket import (
    LONGEST_LINE,
    MOST_CLIENTS,
    ROWS_AT_ONCE,
    ControlSocket,
    encoded,
)
from vmm.conversion.events import CAPACITY
from vmm.core import unix_listener
from vmm.core.errors import UsageError
from vmm.core.events import Kind


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "control")
    yield made
    made.stop()


# -- commands -------------------------------------------------------------------------------------


def test_each_command_does_what_it_says_in_order(server: Server) -> None:
    answers = server.ask(
        line("status"), line("pause"), line("dump-state"), line("resume"), line("quit")
    )

    assert [answer["ok"] for answer in answers] == [True] * 5
    assert answers[0]["state"] == "running" and answers[0]["exits"] == 7
    assert answers[2]["pages"] == server.operations.pages
    assert server.operations.calls == ["pause", "resume", "quit"]


def test_last_line_may_lack_its_end(server: Server) -> None:
    assert server.ask(line("status").rstrip())[0]["ok"]


def test_line_may_come_in_pieces_and_is_answered_once(server: Server) -> None:
    connection = server.connect()
    whole = line("pause")

    for byte in whole:
        connection.sendall(bytes((byte,)))

    assert json.loads(connection.makefile("rb").readline()) == {"ok": True}
    assert server.operations.calls == ["pause"]


@pytest.mark.parametrize("gpa", [8192, "8192", "0x2000"])
def test_convert_takes_numbers_and_text(server: Server, gpa: object) -> None:
    (answer,) = server.ask(line("convert", kind="share", gpa=gpa, size=4096))

    assert answer == {"ok": True}
    assert server.operations.calls == [(Kind.SHARE, 8192, 4096)]


def test_refused_conversion_names_the_errno_and_what_it_means(server: Server) -> None:
    server.operations.answer = -errno.EACCES

    (answer,) = server.ask(line("convert", kind="unshare", gpa=0, size=4096))

    assert answer == {"ok": False, "error": "unshare [0x0, 0x1000): EACCES, a policy refused it"}


def test_pause_that_a_device_keeps_from_happening_is_said(server: Server) -> None:
    server.operations.can_pause = False

    (answer,) = server.ask(line("pause"))

    assert answer["ok"] is False and "runs on" in answer["error"]


def test_devices_are_listed_and_started_anew(server: Server) -> None:
    answers = server.ask(line("devices"), line("restart-device", device="blk0"))

    assert answers == [{"ok": True, "devices": {"blk0": {"pid": 7}, "blk1": None}}, {"ok": True}]
    assert server.operations.calls == ["restart blk0"]


def test_device_that_cannot_be_started_anew_is_said(server: Server) -> None:
    answers = server.ask(
        *(line("restart-device", device=name) for name in ("blk1", "blk2", 7)),
        line("restart-device"),
    )

    assert [answer["ok"] for answer in answers] == [False] * 4
    assert [answer["error"] for answer in answers[:2]] == [
        "blk1 is in pyvmm's own process", "no memory",
    ]  # fmt: skip
    assert all('"device"' in answer["error"] for answer in answers[2:])


# -- clients that don't mean well -----------------------------------------------------------------

NONSENSE = [
    (b"\n", "not a line of JSON"),
    (b"\xff\xfe\x00\n", "not a line of JSON"),
    (b"{\n", "not a line of JSON"),
    (b"[" * 60000 + b"\n", "not a line of JSON"),
    (b"9" * 5000 + b"\n", "not a line of JSON"),
    (b"[]\n", "not a JSON object"),
    (b"null\n", "not a JSON object"),
    (b"{}\n", "command None is unknown"),
    (line("reboot"), "command 'reboot' is unknown; use status"),
    (b'{"command": ["status"]}\n', "unknown"),
    (b'{"command": "' + b"x" * 60000 + b'"}\n', "unknown"),
    (line("convert"), "kind"),
    (line("convert", kind=["share"], gpa=0, size=4096), "kind"),
    (line("convert", kind="share", gpa=None, size=4096), "gpa"),
    (line("convert", kind="share", gpa=True, size=4096), "gpa"),
    (line("convert", kind="share", gpa=-4096, size=4096), "gpa"),
    (line("convert", kind="share", gpa=1 << 64, size=4096), "gpa"),
    (line("convert", kind="share", gpa=0.5, size=4096), "gpa"),
    (line("convert", kind="share", gpa="1e3", size=4096), "gpa"),
    (line("convert", kind="share", gpa=0, size="4K"), "size"),
    (line("convert", kind="share", gpa=0, size=0), "whole pages"),
    (line("convert", kind="share", gpa=1, size=4096), "whole pages"),
    (line("convert", kind="share", gpa=0, size=100), "whole pages"),
]


@pytest.mark.parametrize(("sent", "error"), NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_gets_an_error_line_and_the_next_line_its_answer(
    server: Server, sent: bytes, error: str
) -> None:
    refused, answered = server.ask(sent, line("status"))

    assert refused["ok"] is False and error in refused["error"]
    assert len(refused["error"]) < 300
    assert answered["ok"] is True
    assert server.operations.calls == []


def test_line_without_end_is_cut_off(server: Server) -> None:
    connection = server.connect()
    connection.sendall(b"x" * (LONGEST_LINE + 1))

    answer = json.loads(connection.makefile("rb").read())

    assert answer == {"ok": False, "error": f"a line is at most {LONGEST_LINE} bytes long"}
    assert server.ask(line("status"))[0]["ok"]


def test_client_that_takes_no_answers_is_not_read_from_and_holds_nobody_up(server: Server) -> None:
    server.operations.pages = [[4096 * n, 4096, "private"] for n in range(50_000)]
    stuck = server.connect()
    stuck.sendall(line("dump-state") * 100)

    assert server.ask(line("status"))[0]["ok"]

    answers = stuck.makefile("rb")
    assert [len(json.loads(answers.readline())["pages"]) for _ in range(3)] == [50_000] * 3


def test_client_that_hangs_up_at_once_harms_nothing(server: Server) -> None:
    server.operations.pages = [[4096 * n, 4096, "private"] for n in range(50_000)]
    for _ in range(5):
        connection = server.connect()
        connection.sendall(line("dump-state") * 3)
        connection.close()

    assert server.ask(line("status"))[0]["ok"]


def test_followers_that_have_gone_keep_no_place(server: Server) -> None:
    for _ in range(MOST_CLIENTS):
        with server.connect() as follower:
            follower.sendall(line("follow"))
            assert follower.recv(100) == b'{"ok": true}\n'
            follower.shutdown(socket.SHUT_WR)
            for _ in range(2):  # the first may be in the middle of a round
                has_looked = threading.Event()
                server.loop.set_timer(0, has_looked.set)
                assert has_looked.wait(10)

    assert server.ask(line("status"))[0]["ok"]


def test_clients_beyond_the_limit_are_told_so(server: Server) -> None:
    for _ in range(MOST_CLIENTS):
        connection = server.connect()
        connection.sendall(line("status"))
        assert json.loads(connection.makefile("rb").readline())["ok"]

    refused = json.loads(server.connect().makefile("rb").read())
    server.connections[0].close()

    assert refused["ok"] is False and "clients" in refused["error"]


# -- the file -------------------------------------------------------------------------------------


def test_file_is_its_owners_alone_and_goes_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "control"
    before = os.umask(0)
    try:
        control = ControlSocket(str(path))
    finally:
        assert os.umask(before) == 0

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    control.close()
    control.close()
    assert not path.exists()


def test_file_that_somebody_put_in_its_place_stays(tmp_path: Path) -> None:
    control = ControlSocket(str(tmp_path / "control"))
    (tmp_path / "other").write_text("mine")
    (tmp_path / "other").rename(tmp_path / "control")

    control.close()

    assert (tmp_path / "control").read_text() == "mine"


def test_path_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")

    with pytest.raises(UsageError, match=f"--control {path}: .*in use.*where nothing is yet"):
        ControlSocket(str(path))

    assert path.read_text() == "mine"


def test_path_that_is_listened_at_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    first = ControlSocket(path)

    with pytest.raises(UsageError, match=r"in use.*where nothing is yet"):
        ControlSocket(path)

    first.close()


def test_socket_of_a_run_that_was_killed_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "control"))

    control = ControlSocket(str(tmp_path / "control"))

    control.close()
    assert not (tmp_path / "control").exists()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/nowhere/at/all", "No such file.*directory that you may write to"),
        ("/" + "x" * 200, "too long.*107 bytes"),
        ("", "--control : "),
    ],
)
def test_path_that_cannot_be_a_socket_is_refused(path: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        ControlSocket(path)


def test_lack_of_fds_is_survived(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    accepting = server.control._accepting
    listener = accepting._listener
    accept = listener.accept

    class NoFds:
        def __getattr__(self, name: str) -> Any:
            return getattr(listener, name)

        def accept(self) -> Any:
            if not failed.is_set():
                failed.set()
                raise OSError(errno.EMFILE, "too many open files")
            return accept()

    monkeypatch.setattr(unix_listener, "AGAIN_SECONDS", 0.001)
    accepting._listener = NoFds()

    assert server.ask(line("status"))[0]["ok"]
    assert failed.is_set()


# -- long answers ---------------------------------------------------------------------------------


def test_long_answer_is_made_in_pieces() -> None:
    made = 0

    def rows() -> Iterator[list[int]]:
        nonlocal made
        for number in range(5 * ROWS_AT_ONCE + 3):
            made += 1
            yield [number]

    text, steps = b"", []
    for piece in encoded({"ok": True, "pages": rows(), "none": [], "few": [1, 2], "end": {"a": 1}}):
        text += piece
        steps.append(made)
        made = 0

    assert json.loads(text) == {
        "ok": True,
        "pages": [[number] for number in range(5 * ROWS_AT_ONCE + 3)],
        "none": [],
        "few": [1, 2],
        "end": {"a": 1},
    }
    assert text.endswith(b"}\n") and text.count(b"\n") == 1
    assert max(steps) == ROWS_AT_ONCE


def test_another_client_has_its_answer_between_the_pieces_of_a_long_one(server: Server) -> None:
    """The pieces are as many turns of the loop."""
    seen: list[int] = []
    served = threading.Event()

    def rows() -> Iterator[list[int]]:
        for number in range(4 * ROWS_AT_ONCE):
            if number == ROWS_AT_ONCE:
                seen.append(len(server.operations.calls))
                other.sendall(line("pause"))
            yield [number]
        seen.append(len(server.operations.calls))
        served.set()

    server.operations.pages = rows()  # type: ignore[assignment]
    other, asking = server.connect(), server.connect()
    answers = other.makefile("rb")
    other.sendall(line("status"))
    answers.readline()

    asking.sendall(line("dump-state"))

    assert json.loads(answers.readline()) == {"ok": True}
    assert len(json.loads(asking.makefile("rb").readline())["pages"]) == 4 * ROWS_AT_ONCE
    assert served.wait(10)
    assert seen == [0, 1]


# -- following --------------------------------------------------------------------------------


def test_follower_gets_events_until_the_socket_closes(server: Server) -> None:
    connection = server.connect()
    lines = connection.makefile("rb")
    connection.sendall(line("follow"))
    assert json.loads(lines.readline()) == {"ok": True}
    assert server.operations.events is not None

    server.operations.events.note("paused")
    first = json.loads(lines.readline())
    server.operations.events.note("ended", exit="poweroff", reason="")
    server.stop()

    assert first["event"] == "paused"
    assert [json.loads(each)["event"] for each in lines] == ["ended"]


def test_follower_that_says_no_more_is_told_events_all_the_same(server: Server) -> None:
    connection = server.connect()
    lines = connection.makefile("rb")
    connection.sendall(line("follow"))
    connection.shutdown(socket.SHUT_WR)
    assert json.loads(lines.readline()) == {"ok": True}
    assert server.operations.events is not None

    server.operations.events.note("paused")

    assert json.loads(lines.readline())["event"] == "paused"


def test_follower_that_reads_nothing_loses_events_and_holds_nobody_up(server: Server) -> None:
    slow = server.connect()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lines = slow.makefile("rb")
    slow.sendall(line("follow"))
    assert json.loads(lines.readline()) == {"ok": True}
    assert server.operations.events is not None

    for number in range(4 * CAPACITY):
        server.operations.events.note("paused", number=number, text="x" * 200)
    assert server.ask(line("status"))[0]["ok"] is True

    told: list[dict[str, Any]] = []
    while not told or told[-1]["event"] != "lost":
        told.append(json.loads(lines.readline()))
    assert [each["number"] for each in told[:-1]] == list(range(len(told) - 1))
    assert told[-1]["count"] == 4 * CAPACITY - (len(told) - 1)


def test_follower_that_hangs_up_is_forgotten(server: Server) -> None:
    connection = server.connect()
    lines = connection.makefile("rb")
    connection.sendall(line("follow"))
    lines.readline()
    events = server.operations.events
    assert events is not None and events._subscriptions
    lines.close()
    connection.close()

    while events._subscriptions:
        server.ask(line("status"))


def test_command_on_a_following_connection_is_answered_between_events(server: Server) -> None:
    connection = server.connect()
    lines = connection.makefile("rb")
    connection.sendall(line("follow") + line("follow") + line("status"))

    answers = [json.loads(lines.readline()) for _ in range(3)]

    assert [each["ok"] for each in answers] == [True, True, True]
    assert server.operations.events is not None
    assert len(server.operations.events._subscriptions) == 1


def test_machine_without_events_says_so(server: Server) -> None:
    server.operations.events = None

    assert "no events to follow" in server.ask(line("follow"))[0]["error"]
