"""The device loop over pipes and eventfds; no test waits for time to pass."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from vmm.core.event_loop import EventLoop, drain


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_run_after_stop_returns_without_serving(loop: EventLoop, eventfd: int) -> None:
    served: list[str] = []
    loop.add(eventfd, lambda: served.append("served"))
    os.eventfd_write(eventfd, 1)

    loop.stop()
    loop.run()

    assert served == []


def test_run_serves_what_is_readable_and_again_while_it_stays_readable(
    loop: EventLoop, eventfd: int
) -> None:
    counts: list[int] = []

    def served() -> None:
        counts.append(len(counts))
        if len(counts) == 3:
            drain(eventfd)
            loop.stop()

    loop.add(eventfd, served)
    os.eventfd_write(eventfd, 1)

    loop.run()

    assert counts == [0, 1, 2]


def test_stop_from_another_thread_ends_an_idle_loop(loop: EventLoop, eventfd: int) -> None:
    running = threading.Event()

    def served() -> None:
        drain(eventfd)
        running.set()

    loop.add(eventfd, served)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    os.eventfd_write(eventfd, 1)
    assert running.wait(30)

    loop.stop()
    thread.join(30)

    assert not thread.is_alive()


def test_stop_leaves_the_rest_of_a_batch_unserved(loop: EventLoop) -> None:
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2)]
    called: list[int] = []

    def serve(fd: int) -> None:
        called.append(fd)
        loop.stop()

    for fd in fds:
        loop.add(fd, partial(serve, fd))

    loop.run()

    assert len(called) == 1
    for fd in fds:
        os.close(fd)


def test_callback_removed_by_an_earlier_one_of_the_same_batch_is_not_called(
    loop: EventLoop,
) -> None:
    fds = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2)]
    called: list[int] = []

    def serve(index: int) -> None:
        called.append(index)
        loop.remove(fds[1 - index])
        loop.stop()

    for index, fd in enumerate(fds):
        loop.add(fd, partial(serve, index))

    loop.run()

    assert len(called) == 1
    for fd in fds:
        os.close(fd)


def test_hang_up_of_the_other_end_is_served(loop: EventLoop) -> None:
    read_end, write_end = os.pipe()
    seen: list[bytes] = []

    def hung_up() -> None:
        seen.append(os.read(read_end, 1))
        loop.stop()

    loop.add(read_end, hung_up)
    os.close(write_end)

    loop.run()

    assert seen == [b""]
    os.close(read_end)


def test_exception_in_a_callback_reaches_the_caller_and_the_loop_can_go_on(
    loop: EventLoop, eventfd: int
) -> None:
    def fail_once() -> None:
        drain(eventfd)
        raise ZeroDivisionError

    loop.add(eventfd, fail_once)
    os.eventfd_write(eventfd, 1)

    with pytest.raises(ZeroDivisionError):
        loop.run()

    loop.remove(eventfd)
    loop.add(eventfd, loop.stop)
    os.eventfd_write(eventfd, 1)
    loop.run()


def test_add_of_a_regular_file_is_refused(loop: EventLoop, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(PermissionError):
        loop.add(file.fileno(), lambda: None)


def test_remove_of_an_unknown_fd_is_ignored(loop: EventLoop) -> None:
    loop.remove(12345)


def test_drain_takes_the_whole_count_and_does_not_wait(eventfd: int) -> None:
    os.eventfd_write(eventfd, 7)

    drain(eventfd)
    drain(eventfd)

    with pytest.raises(BlockingIOError):
        os.eventfd_read(eventfd)


def test_close_closes_the_loops_own_fds() -> None:
    before = set(os.listdir("/proc/self/fd"))
    made = EventLoop()

    made.close()

    assert set(os.listdir("/proc/self/fd")) == before


# -- the timer ------------------------------------------------------------------------------------


def test_timer_fires_once_on_the_loops_thread(loop: EventLoop) -> None:
    fired: list[int] = []

    def fire() -> None:
        fired.append(threading.get_ident())
        loop.set_timer(time.monotonic() + 0.001, loop.stop)

    loop.set_timer(0.0, fire)
    loop.run()

    assert fired == [threading.get_ident()]


def test_timer_set_from_another_thread_wakes_an_idle_loop(loop: EventLoop) -> None:
    thread = threading.Thread(target=loop.set_timer, args=(0.0, loop.stop))
    thread.start()

    loop.run()

    thread.join()


def test_timer_far_away_does_not_fire_and_a_callback_has_one_timer(loop: EventLoop) -> None:
    fired: list[str] = []

    def stop() -> None:
        fired.append("near")
        loop.stop()

    loop.set_timer(1e12, lambda: fired.append("far"))
    loop.set_timer(1e12, stop)
    loop.set_timer(0.0, stop)
    loop.run()

    assert fired == ["near"]


def test_timers_fire_in_turn_each_at_its_time(loop: EventLoop) -> None:
    fired: list[str] = []
    now = time.monotonic()

    def last() -> None:
        fired.append("second")
        loop.stop()

    loop.set_timer(now + 0.002, last)
    loop.set_timer(now + 0.001, lambda: fired.append("first"))
    loop.run()

    assert fired == ["first", "second"]


def test_timer_that_has_fired_does_not_fire_with_the_next_event(
    loop: EventLoop, eventfd: int
) -> None:
    fired: list[str] = []
    events: list[int] = []

    def fire() -> None:
        fired.append("fired")
        os.eventfd_write(eventfd, 1)

    def served() -> None:
        events.append(len(events))
        if len(events) == 3:
            loop.stop()

    loop.add(eventfd, served)
    loop.set_timer(0.0, fire)
    loop.run()

    assert fired == ["fired"]


# -- several timers, holding, writing -------------------------------------------------------------


def test_each_callback_has_a_timer_of_its_own(loop: EventLoop) -> None:
    fired: list[str] = []

    def first() -> None:
        fired.append("first")

    def last() -> None:
        fired.append("last")
        loop.stop()

    now = time.monotonic()
    loop.set_timer(now + 0.002, last)
    loop.set_timer(now + 3600, first)
    loop.set_timer(now, first)  # replaces its own

    loop.run()

    assert fired == ["first", "last"]


def test_stop_by_one_of_the_timers_due_leaves_the_others(loop: EventLoop) -> None:
    fired: list[int] = []

    def stopping(number: int) -> None:
        fired.append(number)
        loop.stop()

    for number in range(2):
        loop.set_timer(0.0, partial(stopping, number))

    loop.run()

    assert fired == [0]


def test_held_loop_serves_only_what_is_unheld_and_the_rest_after_the_release(
    loop: EventLoop, eventfd: int
) -> None:
    served: list[str] = []
    steps = os.eventfd(3, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)

    def step() -> None:
        os.eventfd_read(steps)
        served.append("unheld")
        if len(served) == 1:
            loop.hold()
            os.eventfd_write(eventfd, 1)
        elif len(served) == 3:
            loop.release()

    def device() -> None:
        drain(eventfd)
        served.append("device")
        loop.stop()

    loop.add(steps, step, unheld=True)
    loop.add(eventfd, device)

    loop.run()
    os.close(steps)

    assert served == ["unheld", "unheld", "unheld", "device"]


def test_hold_by_a_callback_keeps_the_rest_of_its_batch_back(loop: EventLoop) -> None:
    served: list[int] = []
    eventfds = [os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]

    def device(number: int) -> None:
        drain(eventfds[number])
        served.append(number)
        loop.hold()
        loop.set_timer(0.0, loop.stop)

    for number in range(2):
        loop.add(eventfds[number], partial(device, number))

    loop.run()
    for fd in eventfds:
        os.close(fd)

    assert len(served) == 1


def test_fd_can_be_watched_for_writing_and_then_for_reading(loop: EventLoop) -> None:
    read_end, write_end = os.pipe()
    seen: list[str] = []

    def writable() -> None:
        seen.append("writable")
        loop.watch(write_end, writable)
        os.write(write_end, b"x")

    def readable() -> None:
        seen.append("readable")
        loop.stop()

    loop.watch(write_end, writable, writable=True)
    loop.watch(read_end, readable, readable=True, unheld=True)

    loop.run()
    os.close(read_end)
    os.close(write_end)

    assert seen == ["writable", "readable"]


def test_fd_that_is_to_be_watched_later_is_not_looked_at_before(loop: EventLoop) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"x")
    seen: list[str] = []

    def timer() -> None:
        seen.append("timer")
        loop.watch(read_end, ready, readable=True, after=0.001)

    def ready() -> None:
        seen.append("ready")
        loop.stop()

    loop.watch(read_end, ready, readable=True)
    loop.watch(read_end, ready, readable=True, after=3600)
    loop.set_timer(0.0, timer)

    loop.run()
    os.close(read_end)
    os.close(write_end)

    assert seen == ["timer", "ready"]


@pytest.mark.parametrize("again", [True, False], ids=["watched at once", "removed"])
def test_what_was_wanted_of_an_fd_for_later_is_replaced(loop: EventLoop, again: bool) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"x")
    seen: list[str] = []

    def second() -> None:
        seen.append("second")
        loop.watch(read_end, second)

    loop.watch(read_end, lambda: seen.append("first"), readable=True, after=1e-9)
    if again:
        loop.watch(read_end, second, readable=True)
    else:
        loop.remove(read_end)
    loop.set_timer(time.monotonic() + 0.01, loop.stop)

    loop.run()
    os.close(read_end)
    os.close(write_end)

    assert seen == (["second"] if again else [])


# --- who must not wait for a whole round ---


class SlowRound:
    """Callbacks that take a second each by `clock`, and are ready at every round."""

    def __init__(self, loop: EventLoop, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.now = 0.0
        self.order: list[str] = []
        self.last: Callable[[], None] = lambda: None
        self._loop = loop
        monkeypatch.setattr("vmm.core.event_loop.time.monotonic", lambda: self.now)
        self._fds = [os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        for number, fd in enumerate(self._fds):
            loop.add(fd, partial(self._turn, str(number), fd))

    def _turn(self, name: str, fd: int) -> None:
        drain(fd)
        self.now += 1.0
        self.order.append(name)
        self.last()

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


def test_run_serves_the_unheld_between_two_slow_callbacks(
    loop: EventLoop, eventfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowRound(loop, monkeypatch, 5)

    def quit_asked() -> None:
        slow.order.append("quit")
        loop.stop()

    def ask() -> None:
        if len(slow.order) == 2:  # in the middle of the round, after its epoll_wait
            os.eventfd_write(eventfd, 1)

    slow.last = ask
    loop.add(eventfd, quit_asked, unheld=True)

    loop.run()

    assert slow.order == ["0", "1", "quit"]
    slow.close()


def test_run_calls_who_was_served_in_between_once(
    loop: EventLoop, eventfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blocking read of the console's input would wait for a key if it were called again."""
    slow = SlowRound(loop, monkeypatch, 2)

    def key() -> None:
        drain(eventfd)
        slow.order.append("key")

    loop.add(eventfd, key, unheld=True)
    os.eventfd_write(eventfd, 1)
    end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    loop.add(end, loop.stop)

    def finish() -> None:
        if len(slow.order) == 3:
            os.eventfd_write(end, 1)

    slow.last = finish

    loop.run()

    assert slow.order == ["0", "key", "1"]
    slow.close()
    os.close(end)


def test_run_fires_timers_between_two_slow_callbacks(
    loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowRound(loop, monkeypatch, 5)

    def timer() -> None:
        slow.order.append("timer")
        loop.stop()

    loop.set_timer(1.5, timer)

    loop.run()

    assert slow.order == ["0", "1", "timer"]
    slow.close()


def test_run_whose_loop_is_held_in_between_serves_nothing_else(
    loop: EventLoop, eventfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowRound(loop, monkeypatch, 5)

    def pause() -> None:
        drain(eventfd)
        loop.hold()
        loop.set_timer(slow.now, loop.stop)

    slow.last = lambda: os.eventfd_write(eventfd, 1)
    loop.add(eventfd, pause, unheld=True)

    loop.run()

    assert slow.order == ["0"]
    slow.close()
