"""A process that stays out of the sandbox, for what a run still has to do with paths at its end.

It puts the report in its place, brings a shared folder back, and removes the sockets that pyvmm
listened at, also when pyvmm was killed. Nothing else: what it can be asked for is fixed when it
starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Collection, Sequence
from threading import Lock

from vmm.core.errors import HostError, OutputError
from vmm.core.lean_typing import NoReturn
from vmm.core.output import write_all

_IGNORED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGUSR1,
    signal.SIGUSR2, signal.SIGPIPE,
)  # fmt: skip
"""What a terminal or a process manager sends to all of a command's processes."""
_MOST = 1 << 30


class Outside:
    """The process, from when it is made until `close`."""

    def __init__(
        self,
        tasks: Sequence[Callable[[bytes], None]],
        last: Callable[[], None],
        keeps: Collection[int],
    ) -> None:
        """A fork of this one, which should have no threads yet.

        `tasks` are what it can be asked for, each with a message, and may raise OutputError;
        `last` is what it does when this process has let go of it or has ended; `keeps`: the
        descriptors that those need, besides standard error. Raises HostError.
        """
        self._asking = Lock()
        reader, self._writer = os.pipe2(os.O_CLOEXEC)
        self._reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._pid = os.fork()
        except OSError as error:
            for fd in (reader, self._writer, self._reader, writer):
                os.close(fd)
            raise HostError(
                f"starting the process that stays outside the sandbox failed: {error.strerror}; "
                "free memory or processes, or use --sandbox=off"
            ) from error
        if self._pid == 0:
            _serve(reader, writer, tasks, last, {2, *keeps})
        os.close(reader)
        os.close(writer)

    def do(self, task: int, message: bytes = b"") -> None:
        """Have a task done there, by its place among the tasks. Raises OutputError: the task's
        own, or that the process is gone."""
        try:
            with self._asking:
                _send(self._writer, bytes((task,)) + message)
                text = _received(self._reader).decode()
        except (OSError, EOFError):
            raise OutputError("the process outside the sandbox has ended") from None
        if text:
            raise OutputError(text)

    def close(self) -> None:
        """Let go of it, and wait until it has ended; any number of times."""
        if self._pid:
            os.close(self._writer)
            os.close(self._reader)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._pid = 0


def _send(fd: int, data: bytes) -> None:
    write_all(fd, len(data).to_bytes(8, "little") + data)


def _received(fd: int) -> bytes:
    """The next message. Raises EOFError where the other side lets go before its end."""
    size = min(int.from_bytes(_read(fd, 8), "little"), _MOST)
    return _read(fd, size)


def _read(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.read(fd, min(size - len(data), 1 << 16))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _serve(
    reader: int,
    writer: int,
    tasks: Sequence[Callable[[bytes], None]],
    last: Callable[[], None],
    keeps: Collection[int],
) -> NoReturn:
    """The process itself. Never returns: its parent's stack above us must not run twice."""
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        # Locks, pipes and terminals that it has no business with must not outlive the parent.
        former = -1
        for fd in sorted({reader, writer, *keeps}):
            os.closerange(former + 1, fd)
            former = fd
        os.closerange(former + 1, os.sysconf("SC_OPEN_MAX"))
        try:
            while True:
                text = ""
                message = _received(reader)
                try:
                    tasks[message[0]](message[1:])
                except OutputError as error:
                    text = str(error)
                _send(writer, text.encode())
        except (EOFError, OSError):
            pass
        last()
    finally:
        os._exit(0)
