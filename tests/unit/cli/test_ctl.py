"""`pyvmm ctl`: its words, its answers, and nobody at the other end."""

from __future__ import annotations

import errno
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.control import Server
from tests.unit.cli.conftest import Command
from vmm.core.events import Kind
from vmm.policy import Deny
from vmm.snapshot.folder import SnapshotFolder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "control")
    yield made
    made.stop()


def test_answer_is_printed_and_status_is_0(server: Server, command: Command) -> None:
    paused = command("ctl", str(server.path), "pause")
    status = command("ctl", str(server.path), "status")

    assert paused.status == status.status == 0
    assert json.loads(paused.out) == {"ok": True}
    assert json.loads(status.out)["exits"] == 7
    assert server.operations.calls == ["pause"]


def test_conversion_is_asked_for_and_a_refusal_is_status_1(
    server: Server, command: Command
) -> None:
    server.operations.answer = -errno.EBUSY

    result = command("ctl", str(server.path), "convert", "share", "0x1000", "8192")

    assert result.status == 1
    assert re.search("EBUSY, another conversion .*try again", json.loads(result.out)["error"])
    assert server.operations.calls == [(Kind.SHARE, 0x1000, 8192)]


def test_device_is_started_anew_and_a_refusal_is_status_1(server: Server, command: Command) -> None:
    done = command("ctl", str(server.path), "device", "restart", "blk0")
    refused = command("ctl", str(server.path), "device", "restart", "blk1")

    assert (done.status, refused.status) == (0, 1)
    assert server.operations.calls == ["restart blk0"]
    assert "own process" in json.loads(refused.out)["error"]


def test_refusal_by_a_policy_names_it(server: Server, command: Command) -> None:
    server.operations.answer, server.operations.word = -errno.EACCES, Deny()

    result = command("ctl", str(server.path), "convert", "share", "0x1000", "8K")

    refused = json.loads(result.out)["error"]
    assert refused == "share [0x1000, 0x3000): EACCES, policy Quota refused it"


def test_device_that_does_not_rest_is_explained(server: Server, command: Command) -> None:
    server.operations.can_pause = False

    result = command("ctl", str(server.path), "pause")

    assert result.status == 1
    assert re.search("a disk may hang.*runs on, try again", json.loads(result.out)["error"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "pasue"], "ctl has no command pasue; did you mean pause?; see"),
        (["x", "zzz"], "the commands are status, pause"),
        (["x", "convert", "share", "1"], "convert takes share|unshare GPA SIZE, not share 1"),
        (["x", "status", "now"], "ctl status takes no now"),
        (["x", "device"], "ctl device takes restart NAME, not nothing"),
        (["x", "device", "stop", "blk0"], "ctl device takes restart NAME, not stop blk0"),
    ],
)
def test_wrong_words_are_told_with_the_right_ones(
    command: Command, words: list[str], message: str
) -> None:
    assert message in command("ctl", *words).complaint


def test_follow_prints_a_line_for_each_event_until_the_run_ends(
    server: Server, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "vmm", "ctl", str(server.path), "follow"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as follower:  # fmt: skip
        assert server.operations.events is not None
        while not server.operations.events._subscriptions:
            assert follower.poll() is None
        server.operations.events.note("paused")
        server.operations.events.note("ended", exit="poweroff")
        assert follower.stdout is not None
        lines = [json.loads(follower.stdout.readline()) for _ in range(2)]
        server.stop()
        rest = follower.stdout.read()

    assert [line["event"] for line in lines] == ["paused", "ended"]
    assert (rest, follower.returncode) == ("", 0)


def test_follow_whose_reader_has_seen_enough_is_no_error(server: Server) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "vmm", "ctl", str(server.path), "follow"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    ) as follower:  # fmt: skip
        assert follower.stdout is not None and follower.stderr is not None
        assert server.operations.events is not None
        while not server.operations.events._subscriptions:
            assert follower.poll() is None
        follower.stdout.close()
        server.operations.events.note("paused")
        said = follower.stderr.read()

    assert (follower.returncode, said) == (0, b"")


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """Who listens there says that to one caller, and hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        yield
        thread.join(10)


def test_follow_of_a_run_that_was_killed_is_told(command: Command, tmp_path: Path) -> None:
    with answering(tmp_path / "s", b'{"ok": true}\n{"event": "paused", "s": 1.0}\n'):
        result = command("ctl", str(tmp_path / "s"), "follow")

    assert (result.status, result.out) == (1, '{"event": "paused", "s": 1.0}\n')
    assert "has gone without saying how it ended; was it killed?" in result.err


@pytest.mark.parametrize("answer", [b"hello\n", b"[1]\n"])
def test_somebody_else_at_the_socket_is_said(
    command: Command, tmp_path: Path, answer: bytes
) -> None:
    with answering(tmp_path / "s", answer):
        result = command("ctl", str(tmp_path / "s"), "status")

    assert "the answer is no JSON object" in result.complaint


@pytest.mark.parametrize(
    "words", [[], ["x"], ["x", "convert"], ["x", "convert", "share", "1"], ["x", "status", "now"]]
)
def test_words_that_are_no_command_are_bad_usage(command: Command, words: list[str]) -> None:
    result = command("ctl", *words)

    assert result.status == 2
    assert "see pyvmm ctl --help" in result.complaint


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/etc/passwd", "/" + "x" * 200, "a\0b"])
def test_path_where_nobody_listens_is_said(command: Command, path: str) -> None:
    result = command("ctl", path, "status")

    assert result.status == 2
    assert "give the PATH of a running pyvmm's --control" in result.complaint


def test_run_that_ends_before_it_answers_is_said(command: Command, tmp_path: Path) -> None:
    with answering(tmp_path / "s", b""):
        result = command("ctl", str(tmp_path / "s"), "status")

    assert result.status == 2
    assert "the run has ended" in result.complaint


def test_help_says_what_there_is(command: Command) -> None:
    result = command("ctl", "--help")

    assert result.status == 0
    assert "dump-state" in result.out


SAVED = {"state": {"cpus": 1}, "pages": [[0, 8192, "shared"]], "memory": [[4096, 4096]]}


def test_snapshot_makes_a_folder_of_what_the_machine_has_written(
    server: Server, command: Command, tmp_path: Path
) -> None:
    server.operations.saved = SAVED

    result = command("ctl", str(server.path), "snapshot", str(tmp_path / "saved"))

    assert result.status == 0
    assert json.loads(result.out) == {
        "ok": True, "shared_bytes": 4096, "private_bytes": 0, "left_out_bytes": 0,
    }  # fmt: skip
    assert server.operations.calls == ["snapshot"]
    folder = SnapshotFolder(str(tmp_path / "saved"))
    ((piece, data),) = folder.contents(folder.state, "memory")
    folder.close()
    assert (piece.start, data[:5]) == (4096, b"guest")


def test_guest_does_not_run_between_snapshot_and_quit(
    server: Server, command: Command, tmp_path: Path
) -> None:
    server.operations.saved = SAVED

    result = command("ctl", str(server.path), "snapshot", str(tmp_path / "saved"), "--then-quit")

    assert result.status == 0
    assert server.operations.calls == ["pause", "snapshot", "quit"]


def test_guest_goes_on_where_the_snapshot_is_refused(
    server: Server, command: Command, tmp_path: Path
) -> None:
    server.operations.refuses_to_save = True

    result = command("ctl", str(server.path), "snapshot", str(tmp_path / "saved"), "--then-quit")

    assert result.status == 1
    assert json.loads(result.out) == {"ok": False, "error": "not now"}
    assert server.operations.calls == ["pause", "snapshot", "resume"]
    assert list(tmp_path.iterdir()) == [server.path]


def test_guest_goes_on_where_the_folder_can_t_be_made(
    server: Server, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "no" / "saved"

    result = command("ctl", str(server.path), "snapshot", str(path), "--then-quit")

    assert result.status == 2
    assert f"{path} can't be made: No such file or directory" in result.err
    assert server.operations.calls == ["pause", "resume"]


@pytest.mark.parametrize(
    "words",
    [
        ("dump",),
        ("dump", "a", "b"),
        ("dump", "a", "--then-quit"),
        ("dump", "--with-private"),
        ("snapshot",),
        ("snapshot", ""),
        ("snapshot", "a", "--then-what"),
        ("snapshot", "--then-quit"),
    ],
)
def test_saving_is_told_where_to(server: Server, command: Command, words: tuple[str, ...]) -> None:
    result = command("ctl", str(server.path), *words)

    assert result.status == 2
    assert re.search(f"ctl {words[0]} takes (FILE|DIR ).*; see pyvmm ctl --help", result.err)
    assert server.operations.calls == []
