"""The device loop: waits on file descriptors and calls what belongs to them. No polling.

Who is ready is called in turn, once a round. What the user has a word in (added as `unheld`:
control socket, console, signals) and timers don't wait for the round's end: they are looked at
between two callbacks whenever some milliseconds have passed. So a callback that keeps to a few
milliseconds keeps everybody waiting for as long at most, however many others there are.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable
from functools import partial

_LONGEST_WAIT = 3600.0  # epoll's timeout is a C int of milliseconds
URGENT_SECONDS = 0.002
"""How long callbacks go on before those are looked at that must not wait for all of a round."""

AGAIN_SECONDS = 1.0
"""When it is tried again to wait for what the host had no room for."""


class Postponed:
    """What begins in a while, one thing for each fd at most. From any thread."""

    def __init__(self) -> None:
        self._by_fd: dict[int, tuple[float, Callable[[], None]]] = {}

    def put(self, fd: int, seconds: float, begin: Callable[[], None]) -> None:
        """In so many seconds, in the place of what was to begin there."""
        self._by_fd[fd] = time.monotonic() + seconds, begin

    def drop(self, fd: int) -> None:
        """Not at all; unknown fds are ignored."""
        self._by_fd.pop(fd, None)

    def first(self) -> float | None:
        """When the next one is due, by time.monotonic(); None: there is none."""
        return min((when for when, _ in list(self._by_fd.values())), default=None)

    def begin_due(self) -> None:
        now = time.monotonic()
        for fd, (when, begin) in list(self._by_fd.items()):
            if when <= now:
                self.drop(fd)
                begin()


class EventLoop:
    """One thread runs it; `stop` may be called from any thread or signal handler."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        # What is served while the loop is held; its fds are in the other one too.
        self._unheld_epoll = select.epoll()
        self._unheld: set[int] = set()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._held = False
        self._timers: dict[Callable[[], None], float] = {}
        self._first_timer = 0.0  # when the first of them is due
        self._postponed = Postponed()
        self._timer_lock = threading.Lock()
        self.add(self._wake, lambda: drain(self._wake), unheld=True)

    def add(self, fd: int, callback: Callable[[], None], *, unheld: bool = False) -> None:
        """Call `callback` on the loop's thread whenever `fd` is readable or hung up.

        `unheld`: also while the loop is held. Raises PermissionError for a regular file, which
        epoll can't wait for.
        """
        self.watch(fd, callback, readable=True, unheld=unheld)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; unknown fds are ignored."""
        self._postponed.drop(fd)
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            if fd in self._unheld:
                self._unheld.remove(fd)
                self._unheld_epoll.unregister(fd)

    def watch(
        self,
        fd: int,
        callback: Callable[[], None],
        *,
        readable: bool = False,
        writable: bool = False,
        unheld: bool = False,
        after: float = 0.0,
    ) -> None:
        """Call `callback` whenever `fd` is ready for what is wanted, or hung up; `after`: not
        before so many seconds have passed.

        Replaces what was wanted of `fd` before; with nothing wanted it is no longer watched (a
        hung-up fd would be reported for ever). From any thread, before `fd` is closed. Raises
        PermissionError for a regular file.
        """
        if after or not (readable or writable):
            self.remove(fd)
            if after:
                wanted = {"readable": readable, "writable": writable, "unheld": unheld}
                self._postponed.put(fd, after, partial(self.watch, fd, callback, **wanted))
                self._look_at_postponed()
            return
        self._postponed.drop(fd)
        events = readable * select.EPOLLIN | writable * select.EPOLLOUT
        if fd in self._callbacks:
            self._epoll.modify(fd, events)
            if fd in self._unheld:
                self._unheld_epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
            if unheld:
                try:
                    self._unheld_epoll.register(fd, events)
                except OSError:
                    self._epoll.unregister(fd)
                    raise
                self._unheld.add(fd)
        self._callbacks[fd] = callback

    def watch_in_time(
        self,
        fd: int,
        callback: Callable[[], None],
        *,
        readable: bool = False,
        writable: bool = False,
        after: float = 0.0,
    ) -> None:
        """As `watch`, for who has nobody to tell of an error: where the host has no room for it
        (ENOSPC: fs.epoll.max_user_watches; ENOMEM), it is tried again until it has."""
        if after:
            self.remove(fd)
        else:
            try:
                self.watch(fd, callback, readable=readable, writable=writable)
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                    raise
                after = AGAIN_SECONDS
        again = partial(self.watch_in_time, fd, callback, readable=readable, writable=writable)
        self._postponed.put(fd, after, again)
        self._look_at_postponed()

    def _look_at_postponed(self) -> None:
        self._postponed.begin_due()
        first = self._postponed.first()
        if first is not None:
            self.set_timer(first, self._look_at_postponed)

    def hold(self) -> None:
        """Serve only what was added as `unheld`, and timers, until `release`. From callbacks."""
        self._held = True

    def release(self) -> None:
        """Serve everything again; what became ready meanwhile is served now. From callbacks."""
        self._held = False

    def set_timer(self, when: float, callback: Callable[[], None]) -> None:
        """Call `callback` once on the loop's thread at time.monotonic() == `when`, or soon after.

        A later call for the same callback replaces an earlier one. From any thread.
        """
        with self._timer_lock:
            self._timers[callback] = when
            self._first_timer = min(self._timers.values())
        self._wake_up()

    def stop(self) -> None:
        """Make `run` return after the callback under way."""
        self._stopping = True
        self._wake_up()

    def _wake_up(self) -> None:
        try:
            os.eventfd_write(self._wake, 1)
        except OSError:
            pass  # it is full, and so readable: who ends a run must get to its end

    def run(self) -> None:
        """Serve events until `stop`."""
        while not self._stopping:
            held = self._held
            ready = (self._unheld_epoll if held else self._epoll).poll(self._patience())
            looked = time.monotonic()
            looked_in_between = False
            for fd, _ in ready:
                if looked_in_between and fd in self._unheld:
                    continue  # served in between, and perhaps not ready any more
                self._call(fd)
                if self._stopping:
                    return
                if self._held is not held:
                    break  # what else was ready is reported again, if it may be served
                now = time.monotonic()
                if now - looked >= URGENT_SECONDS and not held:
                    self._serve_urgent()
                    if self._stopping:
                        return
                    if self._held is not held:
                        break
                    looked, looked_in_between = now, True
            if self._timers:
                self._fire()

    def _call(self, fd: int) -> None:
        callback = self._callbacks.get(fd)
        if callback is not None:
            callback()

    def _serve_urgent(self) -> None:
        """In the middle of a round: timers, and the fds served even while the loop is held."""
        for fd, _ in self._unheld_epoll.poll(0):
            self._call(fd)
            if self._stopping:
                return
        if self._timers:
            self._fire()

    def _patience(self) -> float | None:
        """Seconds until the first timer, None without one."""
        if not self._timers:
            return None
        return min(max(self._first_timer - time.monotonic(), 0.0), _LONGEST_WAIT)

    def _fire(self) -> None:
        now = time.monotonic()
        with self._timer_lock:
            if now < self._first_timer:
                return
            due = [callback for callback, when in self._timers.items() if when <= now]
            due.sort(key=self._timers.__getitem__)
            for callback in due:
                del self._timers[callback]
            self._first_timer = min(self._timers.values(), default=0.0)
        for callback in due:
            if not self._stopping:
                callback()

    def close(self) -> None:
        self._epoll.close()
        self._unheld_epoll.close()
        os.close(self._wake)
        self._callbacks.clear()


def drain(eventfd: int) -> None:
    """Take an eventfd's count, which makes it unreadable until the next signal."""
    while True:
        try:
            os.eventfd_read(eventfd)
        except InterruptedError:
            continue  # Python doesn't repeat this one by itself
        except BlockingIOError:
            pass
        return
