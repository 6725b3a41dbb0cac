"""What `--disk vhost-user=` and `--fs` name, and how a mistake is told."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.back_end import BackEndDouble
from vmm.core.errors import UsageError
from vmm.devices.vhost_user.opening import connect, open_disk, open_fs


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[Path, socket.socket]]:
    with closing(socket.socket(socket.AF_UNIX)) as made:
        path = tmp_path / "s"
        made.bind(str(path))
        made.listen()
        yield path, made


def test_disk_is_opened_with_its_back_end(
    listener: tuple[Path, socket.socket], capfd: pytest.CaptureFixture[str]
) -> None:
    path, sock = listener
    double = BackEndDouble()

    def accept() -> None:
        double.socket.close()
        double.socket, _ = sock.accept()
        double._serve()

    thread = threading.Thread(target=accept)
    thread.start()
    disk = open_disk(f"vhost-user={path},queues=3", "blk7")

    assert (disk.name, disk.path, len(disk.queue_sizes)) == ("blk7", str(path), 3)
    disk.close()
    thread.join()
    double.socket.close()
    double._theirs.close()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vhost-user={}/none", "No such file or directory; start the back end first: qemu-storage"),
        ("vhost-user={}", "is not a socket"),
        ("vhost-user={}/bound", "Connection refused"),
        ("vhost-user=", "has no value"),
        ("vhost-user={}/bound,ro", "unknown option 'ro'"),
        ("vhost-user={}/bound,queues=99", "not in the range 1 to 16"),
        ("vhost-user=" + "x" * 300, "File name too long"),
    ],
)
def test_a_disk_that_cannot_be_is_one_line(tmp_path: Path, spec: str, words: str) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(str(tmp_path / "bound"))

        with pytest.raises(UsageError, match=words) as told:
            open_disk(spec.format(tmp_path), "blk0")

    assert "\n" not in str(told.value)
    assert told.value.exit_status == 2


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("t,vhost-user={}/none", "start the back end first: virtiofsd --socket-path="),
        ("t", "it names no socket; write --fs TAG,vhost-user=SOCKET"),
        ("", "it names no file system"),
        ("x" * 37 + ",vhost-user={}", "the tag has 37 bytes, 36 at most fit"),
        ("t,vhost-user={}", "is not a socket"),
        ("t,vhost-user={},cache=on", "unknown option 'cache'"),
    ],
)
def test_a_file_system_that_cannot_be_is_one_line(tmp_path: Path, spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as told:
        open_fs(spec.format(tmp_path), "fs0")

    assert "\n" not in str(told.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may connect everywhere; run as another user")
def test_a_socket_of_others_is_one_line(listener: tuple[Path, socket.socket]) -> None:
    path, _ = listener
    path.chmod(0)

    with pytest.raises(UsageError, match="Permission denied"):
        open_disk(f"vhost-user={path}", "blk0")


def test_a_listener_whose_queue_is_full_is_not_waited_for(
    listener: tuple[Path, socket.socket],
) -> None:
    path, sock = listener
    sock.listen(0)
    made = [connect(str(path))]

    with pytest.raises(BlockingIOError):
        for _ in range(3):
            made.append(connect(str(path)))
    for each in made:
        each.close()


def test_who_listens_and_hangs_up_is_one_line(listener: tuple[Path, socket.socket]) -> None:
    path, sock = listener

    def hang_up() -> None:
        link, _ = sock.accept()
        link.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(UsageError, match="no back end that can be used: it "):
        open_disk(f"vhost-user={path}", "blk0")
    thread.join()
