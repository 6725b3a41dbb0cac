"""The eventfds behind a notify port: what KVM is told when a BAR moves, and when it refuses."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
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
        self.calls = 0
        self.before: Callable[[], object] = lambda: None

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
        self.before()
        self.calls += 1
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


def test_notifier_tells_kvm_of_a_queue_once_it_was_notified_by_an_exit(
    vm: FakeVm, notifier: QueueNotifier
) -> None:
    notifier.move(0xC080)
    assert vm.bound == set()

    notifier.notified(1)
    assert vm.bound == {(0xC080, 1)}
    notifier.notified(1)
    notifier.notified(0)

    assert vm.bound == {(0xC080, 0), (0xC080, 1)}
    assert vm.calls == 2


def test_notifier_follows_its_port(vm: FakeVm, notifier: QueueNotifier) -> None:
    notifier.move(0xC080)
    notifier.notified(0)

    notifier.move(0xD080)
    assert vm.bound == set()
    notifier.notified(0)
    assert vm.bound == {(0xD080, 0)}

    notifier.move(None)
    assert vm.bound == set()
    notifier.notified(0)  # by configuration space, which reaches the register all the same
    assert vm.bound == set()


def test_notifier_whose_port_moves_all_the_time_costs_kvm_nothing(
    vm: FakeVm, notifier: QueueNotifier
) -> None:
    for number in range(1000):
        notifier.move(0xC080 + 0x100 * (number % 2))
        notifier.move(None)

    assert vm.calls == 0


def test_notifier_costs_kvm_no_more_than_the_guest_has_accesses(
    vm: FakeVm, notifier: QueueNotifier
) -> None:
    accesses = 0
    for number in range(1000):
        notifier.move(0xC080 + 0x100 * (number % 2))
        notifier.notified(number % 2)
        notifier.notified(1)
        accesses += 3

    assert vm.calls <= 2 * accesses


@pytest.mark.parametrize("room", [0, 1])
def test_notifier_that_kvm_has_no_room_for_serves_all_the_same(
    vm: FakeVm, notifier: QueueNotifier, loop: EventLoop, room: int
) -> None:
    # The guest moves BARs: it must not be able to end the run with it.
    notified: list[int] = []
    notifier.serve(notified.append)
    vm.room = room
    notifier.move(0xC080)

    for queue in (0, 1, 1, 1):
        notifier.notified(queue)

    assert len(vm.bound) == room
    assert vm.calls == room + 1  # and is not asked again
    notifier.ring(1)
    done = os.eventfd(1)
    loop.add(done, loop.stop)
    loop.run()
    os.close(done)
    assert set(notified) == {0, 1}

    vm.room = 2
    notifier.move(0xD080)
    notifier.notified(0)
    notifier.notified(1)
    assert vm.bound == {(0xD080, 0), (0xD080, 1)}


def test_loop_serves_queues_while_a_vcpu_waits_for_kvm_with_the_port(
    vm: FakeVm, notifier: QueueNotifier, loop: EventLoop
) -> None:
    served = threading.Event()

    def notify(queue: int) -> None:
        served.set()
        loop.stop()

    notifier.serve(notify)
    notifier.move(0xC080)
    vm.before = lambda: served.wait(30)  # KVM takes until the loop has served the other queue
    vcpu = threading.Thread(target=notifier.notified, args=(0,))
    vcpu.start()

    loop.run()
    vcpu.join(60)

    assert served.is_set()
    assert vm.bound == {(0xC080, 0)}


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
