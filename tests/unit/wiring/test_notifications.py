"""The eventfds behind a notify port: what KVM is told when a BAR moves, and when it refuses."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import cast

import pytest

from kvm_bindings import KvmError, Vm
from vmm.core.event_loop import EventLoop
from vmm.policy import PolicyKill
from vmm.wiring.notifications import QueueNotifier, ThreadedQueueNotifier


class FakeVm:
    """KVM's table of ioeventfds, which can be full: (port, queue) of each."""

    def __init__(self) -> None:
        self.bound: set[tuple[int, int]] = set()
        self.room = 2

    def ioeventfd(
        self,
        eventfd: int,
        address: int,
        size: int,
        datamatch: int,
        *,
        port: bool,
        deassign: bool = False,
    ) -> None:
        assert port
        if deassign:
            if (address, datamatch) not in self.bound:
                raise KvmError("KVM_IOEVENTFD", errno.ENOENT)
            self.bound.remove((address, datamatch))
            return
        if len(self.bound) == self.room:
            raise KvmError("KVM_IOEVENTFD", errno.ENOSPC)
        self.bound.add((address, datamatch))


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


@pytest.fixture
def notifier(vm: FakeVm, loop: EventLoop) -> Iterator[QueueNotifier]:
    made = QueueNotifier(cast(Vm, vm), loop, 2)
    yield made
    made.close()


def test_notifier_follows_its_port(vm: FakeVm, notifier: QueueNotifier) -> None:
    notifier.move(0xC080)
    assert vm.bound == {(0xC080, 0), (0xC080, 1)}

    notifier.move(0xD080)
    assert vm.bound == {(0xD080, 0), (0xD080, 1)}

    notifier.move(None)
    assert vm.bound == set()


@pytest.mark.parametrize("room", [0, 1])
def test_notifier_that_kvm_has_no_room_for_leaves_nothing_behind(
    vm: FakeVm, notifier: QueueNotifier, room: int
) -> None:
    # The guest moves BARs: it must not be able to end the run with it.
    vm.room = room

    notifier.move(0xC080)
    assert vm.bound == set()

    vm.room = 2
    notifier.move(0xD080)
    assert vm.bound == {(0xD080, 0), (0xD080, 1)}


def test_notifier_rung_by_hand_notifies_its_queue_on_the_loop(
    notifier: QueueNotifier, loop: EventLoop
) -> None:
    notified: list[int] = []

    def notify(queue: int) -> None:
        notified.append(queue)
        loop.stop()

    notifier.serve(notify)
    notifier.ring(1)
    assert notified == []

    loop.run()

    assert notified == [1]


# --- a thread for each queue ---


@pytest.fixture
def threaded(vm: FakeVm, loop: EventLoop) -> Iterator[ThreadedQueueNotifier]:
    made = ThreadedQueueNotifier(cast(Vm, vm), loop, 2)
    yield made
    made.close()


def test_threaded_notifier_serves_queues_at_the_same_time(threaded: ThreadedQueueNotifier) -> None:
    both = threading.Barrier(2)
    served: list[int] = []
    done = threading.Semaphore(0)

    def notify(queue: int) -> None:
        both.wait(30)  # nobody passes before both are here
        served.append(queue)
        done.release()

    threaded.serve(notify)
    threaded.ring(0)
    threaded.ring(1)

    assert done.acquire(timeout=30) and done.acquire(timeout=30)
    assert sorted(served) == [0, 1]


def test_threaded_notifier_raises_what_a_queue_fails_with_on_the_loop(
    threaded: ThreadedQueueNotifier, loop: EventLoop
) -> None:
    def notify(queue: int) -> None:
        raise PolicyKill("enough")

    threaded.serve(notify)
    threaded.ring(1)

    with pytest.raises(PolicyKill, match="enough"):
        loop.run()


def test_threaded_notifier_does_not_wait_for_ever_for_a_request(
    threaded: ThreadedQueueNotifier,
) -> None:
    at_it, go_on = threading.Event(), threading.Event()

    def notify(queue: int) -> None:
        at_it.set()
        assert go_on.wait(30)

    threaded.serve(notify)
    threaded.ring(0)
    assert at_it.wait(30)

    assert not threaded.end(0)
    go_on.set()
    assert threaded.end(30)
