"""Parking: no vCPU in the guest while somebody holds them, and everything ends when told to."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from kvm_bindings import KvmError
from kvm_bindings.exits import Exit, HypercallExit, InterruptedExit, IoExit, ShutdownExit
from kvm_bindings.x86_64 import Vcpu
from tests.support.fake_vcpu import FakeVcpu, Rig
from vmm.exits.outcome import Outcome
from vmm.exits.run_loop import KICK_SIGNAL, install_kick_handler
from vmm.exits.vcpu_group import VcpuGroup

OUT = IoExit(0x80, 1, 1, True, b"x")
CALL = HypercallExit(12, (0, 0, 0, 0, 0, 0), 0)
SECONDS = 10


class WatchedVcpu(FakeVcpu):
    """Says when it is inside `run`, and lets a test wait for it to enter anew."""

    def __init__(self, *steps: Exit | Callable[[], Exit], index: int = 0) -> None:
        super().__init__(steps, index)
        self.inside = False
        self.entered = threading.Semaphore(0)

    def run(self) -> Exit:
        self.inside = True
        self.entered.release()
        try:
            return super().run()
        finally:
            self.inside = False

    def wait_until_idle(self) -> None:
        """It plays no more steps and computes, inside `run`."""
        assert self.idle.wait(SECONDS)
        while self.entered.acquire(blocking=False):
            pass

    def kvmclock_ctrl(self) -> bool:
        assert not self.inside
        return super().kvmclock_ctrl()


class BusyVcpu(WatchedVcpu):
    """A guest that does port I/O without end."""

    def run(self) -> Exit:
        self.inside = True
        try:
            return InterruptedExit(errno.EINTR) if self.immediate_exit else OUT
        finally:
            self.inside = False


class Guest:
    """A group of fake vCPUs; whoever tells of an outcome stops them all, as a machine does."""

    def __init__(self, rig: Rig) -> None:
        install_kick_handler()
        self.rig = rig
        self.group = VcpuGroup()
        self.outcomes: list[Outcome] = []

    def add(self, *vcpus: WatchedVcpu) -> None:
        for vcpu in vcpus:
            self.group.add(cast(Vcpu, vcpu), self.rig.handlers, self.stop)

    def on_call(self, handle: Callable[[WatchedVcpu], None]) -> None:
        table = self.rig.handlers.table
        table[HypercallExit] = ("hypercall", lambda vcpu, exit: handle(vcpu))

    def stop(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.group.stop()

    def end(self) -> None:
        self.group.stop()
        assert self.group.join(SECONDS)
        assert [runner.error for runner in self.group.runners if runner.error] == []


@pytest.fixture
def guest(rig: Rig) -> Iterator[Guest]:
    made = Guest(rig)
    yield made
    made.end()


def test_parked_vcpus_are_out_of_the_guest_and_go_back_afterwards(guest: Guest) -> None:
    vcpus = [WatchedVcpu(index=0), WatchedVcpu(index=1)]
    guest.add(*vcpus)
    guest.group.start()
    for vcpu in vcpus:
        vcpu.wait_until_idle()

    with guest.group.parked():
        assert [vcpu.inside for vcpu in vcpus] == [False, False]
        assert not vcpus[0].entered.acquire(timeout=0.05)

    for vcpu in vcpus:
        assert vcpu.entered.acquire(timeout=SECONDS)
        assert not vcpu.immediate_exit


def test_parking_kicks_those_inside_kvm_run_and_nobody_else(guest: Guest) -> None:
    kicks: list[int] = []
    signal.signal(KICK_SIGNAL, lambda number, frame: kicks.append(number))
    in_handler, leave = threading.Event(), threading.Event()

    def handle(vcpu: WatchedVcpu) -> None:
        in_handler.set()
        assert leave.wait(SECONDS)

    guest.on_call(handle)
    computing = WatchedVcpu()
    guest.add(computing, WatchedVcpu(CALL, index=1))
    guest.group.start()
    computing.wait_until_idle()
    assert in_handler.wait(SECONDS)

    with guest.group.parked():
        leave.set()

    assert kicks == [KICK_SIGNAL]


def test_vcpu_parks_the_others_from_its_own_handler(guest: Guest) -> None:
    seen: list[bool] = []
    other = WatchedVcpu(index=1)

    def handle(vcpu: WatchedVcpu) -> None:
        other.wait_until_idle()
        with guest.group.parked():
            seen.append(other.inside)

    guest.on_call(handle)
    first = WatchedVcpu(CALL)
    guest.add(first, other)
    guest.group.start()

    first.wait_until_idle()
    assert seen == [False]
    assert other.entered.acquire(timeout=SECONDS)


def test_vcpu_that_waits_for_the_parkers_lock_counts_as_parked(guest: Guest) -> None:
    lock = threading.Lock()
    both = threading.Barrier(2)
    served: list[int] = []

    def handle(vcpu: WatchedVcpu) -> None:
        both.wait(SECONDS)  # now one of them gets the lock, and the other one waits for it
        with lock, guest.group.parked():
            served.append(vcpu.index)

    guest.on_call(handle)
    vcpus = [WatchedVcpu(CALL, index=0), WatchedVcpu(CALL, index=1)]
    guest.add(*vcpus)
    guest.group.start()

    for vcpu in vcpus:
        vcpu.wait_until_idle()
    assert sorted(served) == [0, 1]


def test_vcpu_that_leaves_with_a_long_exit_is_parked_before_its_handler_ends(guest: Guest) -> None:
    parked = threading.Event()
    vcpu = WatchedVcpu()

    def leave_with_an_exit() -> Exit:
        assert vcpu._kicked.wait(SECONDS)
        return CALL

    def handle(vcpu: WatchedVcpu) -> None:
        assert parked.wait(SECONDS)

    guest.on_call(handle)
    vcpu._steps.append(leave_with_an_exit)
    guest.add(vcpu)
    guest.group.start()
    assert vcpu.entered.acquire(timeout=SECONDS)

    with guest.group.parked():
        parked.set()

    vcpu.wait_until_idle()


def test_overlapping_blocks_hold_until_the_last_ends(guest: Guest) -> None:
    vcpu = WatchedVcpu()
    guest.add(vcpu)
    guest.group.start()
    vcpu.wait_until_idle()

    guest.group.pause()
    with guest.group.parked(), guest.group.parked():
        guest.group.resume()
    assert vcpu.entered.acquire(timeout=SECONDS)
    vcpu.wait_until_idle()

    with guest.group.parked():
        with guest.group.parked():
            pass
        assert not vcpu.entered.acquire(timeout=0.05)


def test_pause_holds_until_resume_and_neither_counts_twice(guest: Guest) -> None:
    vcpu = WatchedVcpu()
    guest.add(vcpu)
    guest.group.resume()
    guest.group.pause()
    guest.group.start()
    assert not vcpu.entered.acquire(timeout=0.05)

    guest.group.pause()
    assert guest.group.paused
    guest.group.resume()
    guest.group.resume()

    assert vcpu.entered.acquire(timeout=SECONDS)
    guest.group.pause()
    assert not vcpu.inside


def test_vcpu_released_before_it_came_to_the_gate_runs_on(guest: Guest) -> None:
    in_handler, leave = threading.Event(), threading.Event()

    def handle(vcpu: WatchedVcpu) -> None:
        in_handler.set()
        assert leave.wait(SECONDS)

    guest.on_call(handle)
    vcpu = WatchedVcpu(CALL, OUT)
    guest.add(vcpu)
    guest.group.start()
    assert in_handler.wait(SECONDS)

    with guest.group.parked():
        assert vcpu.immediate_exit
    leave.set()

    vcpu.wait_until_idle()
    assert guest.group.runners[0].exit_counts == {"hypercall": 1, "io": 1}
    assert not vcpu.immediate_exit


def test_ended_and_unstarted_vcpus_are_parked(guest: Guest) -> None:
    guest.rig.handlers.table[ShutdownExit] = ("shutdown", lambda vcpu, exit: stop_one())
    guest.add(WatchedVcpu(ShutdownExit()), WatchedVcpu(index=1))
    ending, _ = guest.group.runners

    def stop_one() -> None:
        ending.stop()

    ending.start()
    assert ending.join(SECONDS)

    with guest.group.parked():
        pass


def test_stop_ends_paused_vcpus(guest: Guest) -> None:
    vcpu = WatchedVcpu()
    guest.add(vcpu)
    guest.group.start()
    vcpu.wait_until_idle()
    guest.group.pause()

    guest.group.stop()

    assert guest.group.join(SECONDS)
    guest.group.resume()
    assert not vcpu.inside


def test_stop_in_a_handler_that_parks_ends_all(guest: Guest) -> None:
    def handle(vcpu: WatchedVcpu) -> None:
        with guest.group.parked():
            guest.stop(Outcome("failed"))

    guest.on_call(handle)
    guest.add(WatchedVcpu(CALL), WatchedVcpu(index=1), BusyVcpu(index=2))
    guest.group.start()

    assert guest.group.join(SECONDS)
    assert guest.outcomes == [Outcome("failed")]


def test_signal_handler_may_stop_while_the_main_thread_waits_for_parking(guest: Guest) -> None:
    slow = threading.Event()
    vcpu = WatchedVcpu()

    def leave_late() -> Exit:
        assert vcpu._kicked.wait(SECONDS)
        main = threading.main_thread().ident or 0
        while not slow.wait(0.01):  # a signal just before the wait's system call does not end it
            signal.pthread_kill(main, signal.SIGUSR1)
        return InterruptedExit(errno.EINTR)

    def on_signal(number: int, frame: object) -> None:
        guest.group.stop()
        slow.set()

    vcpu._steps.append(leave_late)
    guest.add(vcpu)
    former = signal.signal(signal.SIGUSR1, on_signal)
    try:
        guest.group.start()
        assert vcpu.entered.acquire(timeout=SECONDS)
        with guest.group.parked():
            assert not vcpu.inside
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert guest.group.join(SECONDS)


def test_handler_that_raises_while_it_parks_opens_the_gate(guest: Guest) -> None:
    def handle(vcpu: WatchedVcpu) -> None:
        with guest.group.parked():
            raise ValueError("boom")

    guest.on_call(handle)
    other = WatchedVcpu(index=1)
    guest.add(WatchedVcpu(CALL), other)
    guest.group.start()

    assert guest.group.join(SECONDS)
    failed = guest.group.runners.pop(0)
    assert isinstance(failed.error, ValueError)
    assert len(guest.outcomes) == 1


def test_nobody_is_ever_inside_while_several_threads_park_at_random(guest: Guest) -> None:
    vcpus = [BusyVcpu(index=index) for index in range(3)]
    calling = WatchedVcpu(*[CALL] * 50, index=3)
    everybody = [*vcpus, calling]
    seen: list[int] = []

    def look() -> None:
        for _ in range(20):
            seen.append(sum(vcpu.inside for vcpu in everybody))

    def handle(vcpu: WatchedVcpu) -> None:
        with guest.group.parked():
            look()

    guest.on_call(handle)
    guest.add(*everybody)
    guest.group.start()

    for _ in range(50):
        with guest.group.parked():
            look()
    calling.wait_until_idle()

    assert len(seen) == 2000
    assert not any(seen)
    assert all(runner.exit_counts["io"] > 0 for runner in guest.group.runners[:3])


def test_resumed_and_continued_guests_are_told_that_they_were_stopped(guest: Guest) -> None:
    vcpus = [WatchedVcpu(index=0), WatchedVcpu(index=1)]
    guest.add(*vcpus)
    guest.group.start()
    for vcpu in vcpus:
        vcpu.wait_until_idle()

    guest.group.pause()
    assert [vcpu.told_stopped for vcpu in vcpus] == [0, 0]
    guest.group.resume()
    assert [vcpu.told_stopped for vcpu in vcpus] == [1, 1]
    guest.group.process_continued()

    assert [vcpu.told_stopped for vcpu in vcpus] == [2, 2]
    for vcpu in vcpus:
        assert vcpu.entered.acquire(timeout=SECONDS)


def test_guest_that_cannot_be_told_is_resumed_all_the_same(guest: Guest) -> None:
    class Deaf(WatchedVcpu):
        def kvmclock_ctrl(self) -> bool:
            raise KvmError("KVM_KVMCLOCK_CTRL", errno.EIO)

    vcpu = Deaf()
    guest.add(vcpu)
    guest.group.start()
    vcpu.wait_until_idle()
    guest.group.pause()

    with pytest.raises(KvmError):
        guest.group.resume()

    assert vcpu.entered.acquire(timeout=SECONDS)
