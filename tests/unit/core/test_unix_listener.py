"""A listening Unix socket of the user's."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from vmm.core.errors import UsageError
from vmm.core.unix_listener import UnixListener


def test_caller_for_whom_there_is_no_fd_is_hung_up_and_the_next_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is neither taken nor turned away would keep the device loop busy."""
    listener = UnixListener("--x=", str(tmp_path / "s"))
    accept = socket.socket.accept
    refusals = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

    def no_fd_at_first(self: socket.socket) -> object:
        if refusals:
            raise refusals.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", no_fd_at_first)
    open_fds = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(listener.path)
        assert listener.accept() is None
        assert first.recv(1) == b""

        second.connect(listener.path)
        taken = listener.accept()
        assert taken is not None
        taken.close()
    assert len(os.listdir("/proc/self/fd")) == open_fds
    listener.close()
    assert not os.path.exists(listener.path)


def test_socket_is_removed_and_every_fd_closed(tmp_path: Path) -> None:
    open_fds = len(os.listdir("/proc/self/fd"))

    UnixListener("--x=", str(tmp_path / "s")).close()

    assert len(os.listdir("/proc/self/fd")) == open_fds
    assert os.listdir(tmp_path) == []


def bound(path: Path) -> socket.socket:
    """A socket at `path`; nobody listens at it."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    return made


def test_socket_that_was_left_behind_is_replaced_and_nothing_else_appears(tmp_path: Path) -> None:
    bound(tmp_path / "s").close()

    listener = UnixListener("--x=", str(tmp_path / "s"))

    assert os.listdir(tmp_path) == ["s"]
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(listener.path)
    listener.close()


def test_socket_that_somebody_listens_at_since_the_first_look_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with bound(path) as other:
        rename = os.rename

        def listen_and_rename(*arguments: Any, **where: Any) -> None:
            other.listen()  # right after it was looked at
            rename(*arguments, **where)

        monkeypatch.setattr(os, "rename", listen_and_rename)
        with pytest.raises(UsageError, match="cannot listen there: Address already in use"):
            UnixListener("--x=", str(path))

        assert os.listdir(tmp_path) == ["s"]
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))


def test_socket_that_was_exchanged_for_another_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    listener = UnixListener("--x=", str(path))
    others: list[socket.socket] = []
    rename = os.rename

    def exchange_and_rename(*arguments: Any, **where: Any) -> None:
        os.unlink(path)
        others.append(bound(path))
        others[0].listen()
        rename(*arguments, **where)

    monkeypatch.setattr(os, "rename", exchange_and_rename)
    listener.close()

    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    others[0].close()
    assert os.listdir(tmp_path) == ["s"]


def test_listener_whose_socket_was_taken_for_one_left_behind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes start at once: the other one looked before this one listened."""
    listen = socket.socket.listen
    taken: list[UnixListener] = []

    def late(self: socket.socket, backlog: int) -> None:
        if not taken:
            taken.append(None)  # type: ignore[arg-type]
            taken[0] = UnixListener("--x=", str(tmp_path / "s"))
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", late)
    with pytest.raises(UsageError, match="another process has just taken it"):
        UnixListener("--x=", str(tmp_path / "s"))

    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "s"))
    taken[0].close()
    assert os.listdir(tmp_path) == []
