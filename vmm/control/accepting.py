"""Callers of a listening socket, taken on the device loop."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from vmm.core.event_loop import EventLoop
from vmm.core.lean_typing import Protocol

AGAIN_SECONDS = 1.0


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
        self._stopped = False
        self._listen()

    def _listen(self) -> None:
        if not self._stopped:
            self._loop.add(self._listener.fd, self._accept, unheld=True)

    def _accept(self) -> None:
        try:
            connection = self._listener.accept()
        except OSError:  # no fd is free: trying at once would not help
            self._loop.remove(self._listener.fd)
            self._loop.set_timer(time.monotonic() + AGAIN_SECONDS, self._listen)
            return
        if connection is not None:
            try:
                self._taken(connection)
            except OSError:  # epoll has no room for it: that costs the caller, not the run
                connection.close()

    def stop(self) -> None:
        """Take nobody any more; the listener stays open."""
        self._stopped = True
        self._loop.remove(self._listener.fd)
