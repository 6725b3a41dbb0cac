"""Callers of a listening socket, taken on the device loop."""

from __future__ import annotations

import socket
from collections.abc import Callable

from vmm.core import unix_listener
from vmm.core.event_loop import EventLoop
from vmm.core.lean_typing import Protocol


class Listener(Protocol):
    """A UnixListener, or the like for another family."""

    fd: int

    def accept(self) -> socket.socket | None: ...
    def close(self) -> None: ...


class Accepting:
    """Has each caller of `listener` taken by `taken`, on the loop's thread, until `stop`."""

    def __init__(
        self, loop: EventLoop, listener: Listener, taken: Callable[[socket.socket], None]
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._taken = taken
        self._listen()

    def _listen(self, after: float = 0.0) -> None:
        fd = self._listener.fd
        self._loop.watch(fd, self._accept, readable=True, unheld=True, after=after)

    def _accept(self) -> None:
        try:
            connection = self._listener.accept()
        except OSError:  # no fd is free: trying at once would not help
            self._listen(unix_listener.AGAIN_SECONDS)
            return
        if connection is not None:
            try:
                self._taken(connection)
            except OSError:  # epoll has no room for it: that costs the caller, not the run
                connection.close()

    def stop(self) -> None:
        """Take nobody any more; the listener stays open."""
        self._loop.remove(self._listener.fd)
