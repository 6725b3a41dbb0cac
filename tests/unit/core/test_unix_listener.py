"""A listening Unix socket of the user's."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

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
