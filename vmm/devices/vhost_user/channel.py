"""The socket to a back end: requests out, answers in, nothing for longer than its patience.

The other side is another program, which may be broken or hostile. It is waited for under one time
limit; an answer has the size that it has to have; file descriptors that come with one are never
received (recv(2) has no room for them, so that the kernel closes them).
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from array import array
from collections.abc import Sequence

from vmm.devices.vhost_user import messages

PATIENCE = 5.0
"""Seconds for all that one call asks of a back end. Stopping a queue waits for its requests."""


class BackEndError(OSError):
    """The back end is gone, doesn't answer, or says what it may not say; str() is a sentence."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EPROTO, what)

    def __str__(self) -> str:
        return str(self.strerror)


class Channel:
    """A connection. Not locked: whoever uses it sees to it that nobody else does."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._deadline = 0.0
        self.fd = connection.fileno()

    def begin(self, patience: float = PATIENCE) -> None:
        """From now on all together may take so many seconds."""
        self._deadline = time.monotonic() + patience

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request that has no answer. Raises BackEndError."""
        data = messages.message(request, payload)
        # With the first byte: the kernel passes descriptors on with the data that they came with.
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        while data:
            try:
                sent = self._socket.sendmsg([data], control, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, request)
                continue
            except OSError as error:
                raise BackEndError(f"it has let go of the connection: {error.strerror}") from error
            data, control = data[sent:], []

    def ask(self, request: int, payload: bytes = b"", *, size: int = messages.U64.size) -> bytes:
        """The payload of the answer, of exactly `size` bytes. Raises BackEndError."""
        self.send(request, payload)
        found = messages.reply_size(self._receive(messages.HEADER.size, request), request)
        if found != size:
            name = messages.NAMES[request]
            what = "something else" if found is None else f"{found} bytes"
            raise BackEndError(f"it answered {name} with {what}, {size} bytes were due")
        return self._receive(size, request)

    def number(self, request: int) -> int:
        """The answer to a request that has a 64-bit number. Raises BackEndError."""
        (value,) = messages.U64.unpack(self.ask(request))
        return int(value)

    def is_silent(self) -> bool:
        """Whether nothing has come that nobody asked for: not a word, nor the end."""
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _receive(self, size: int, request: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self._socket.recv(size - len(data))
            except BlockingIOError:
                self._wait(select.POLLIN, request)
                continue
            except OSError as error:
                raise BackEndError(f"it has let go of the connection: {error.strerror}") from error
            if not piece:
                name = messages.NAMES[request]
                raise BackEndError(f"it closed the connection when it was asked for {name}")
            data += piece
        return data

    def _wait(self, event: int, request: int) -> None:
        waiter = select.poll()
        waiter.register(self._socket, event)
        left = self._deadline - time.monotonic()
        if left <= 0 or not waiter.poll(left * 1000):
            name = messages.NAMES[request]
            verb = "took no" if event == select.POLLOUT else "did not answer"
            raise BackEndError(f"it {verb} {name} in time")

    def close(self) -> None:
        """Whoever else has this socket open, the back end hears that it is over."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.fd = -1
