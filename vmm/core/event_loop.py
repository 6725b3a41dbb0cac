"""The device loop: waits on file descriptors and calls what belongs to them. No polling."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

_LONGEST_WAIT = 3600.0  # epoll's timeout is a C int of milliseconds


class EventLoop:
    """One thread runs it; `stop` may be called from any thread or signal handler."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._callbacks[self._wake] = lambda: drain(self._wake)
        self._stopping = False
        self._timers: dict[Callable[[], None], float] = {}
        self._timer_lock = threading.Lock()

    def add(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop's thread whenever `fd` is readable or hung up.

        Raises PermissionError for a regular file, which epoll can't wait for.
        """
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; unknown fds are ignored."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def set_timer(self, when: float, callback: Callable[[], None]) -> None:
        """Call `callback` once on the loop's thread at time.monotonic() == `when`, or soon after.

        Each callback has one timer: a later call replaces an earlier one. From any thread.
        """
        with self._timer_lock:
            self._timers[callback] = when
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Make `run` return after the callback under way."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve events until `stop`."""
        while not self._stopping:
            for fd, _ in self._epoll.poll(self._patience()):
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback()
                if self._stopping:
                    return
            if self._timers:
                self._fire()

    def _patience(self) -> float | None:
        """Seconds until the next timer, None without one."""
        with self._timer_lock:
            next_one = min(self._timers.values(), default=None)
        if next_one is None:
            return None
        return min(max(next_one - time.monotonic(), 0.0), _LONGEST_WAIT)

    def _fire(self) -> None:
        now = time.monotonic()
        with self._timer_lock:
            due = [callback for callback, when in self._timers.items() if when <= now]
            due.sort(key=self._timers.__getitem__)
            for callback in due:
                del self._timers[callback]
        for callback in due:
            callback()

    def close(self) -> None:
        self._epoll.close()
        os.close(self._wake)
        self._callbacks.clear()


def drain(eventfd: int) -> None:
    """Take an eventfd's count, which makes it unreadable until the next signal."""
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return
