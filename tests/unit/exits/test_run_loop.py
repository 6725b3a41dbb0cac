"""The run loop over a vCPU without KVM: dispatch, counting, stopping, failing."""

from __future__ import annotations

import errno
import signal
import threading
from typing import cast

import pytest

from kvm_bindings import KvmError
from kvm_bindings.exits import Exit, InterruptedExit, IoExit, ShutdownExit
from kvm_bindings.x86_64 import Vcpu
from tests.support.fake_vcpu import FakeVcpu, RecordingDevice, Rig
from vmm.exits.outcome import INTERNAL_ERROR, KILLED, TRIPLE_FAULT, Outcome
from vmm.exits.run_loop import KICK_SIGNAL, install_kick_handler
from vmm.exits.vcpu_group import VcpuGroup
from vmm.policy import PolicyKill

OUT = IoExit(0x80, 1, 1, True, b"x")


class Run:
    """A runner, and what it told the machine; `stopped` is set with the first outcome."""

    def __init__(self, rig: Rig, vcpu: FakeVcpu) -> None:
        install_kick_handler()
        self.stopped = threading.Event()
        self.outcomes = rig.outcomes
        self.runner = VcpuGroup().add(cast(Vcpu, vcpu), rig.handlers, self.stop)

    def stop(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.runner.stop()
        self.stopped.set()


class KickedVcpu(FakeVcpu):
    """A guest that computes, until the kick signal comes; an earlier one counts as well."""

    def run(self) -> Exit:
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        self.idle.set()
        signal.sigwait({KICK_SIGNAL})
        return InterruptedExit(errno.EINTR)


class SayingDevice(RecordingDevice):
    """Says when it is written to."""

    def __init__(self, written: threading.Event) -> None:
        super().__init__()
        self._written = written

    def write(self, offset: int, size: int, value: int) -> None:
        super().write(offset, size, value)
        self._written.set()


def test_run_loop_dispatches_and_counts_exits(rig: Rig) -> None:
    device = RecordingDevice()
    rig.ports.add(0x80, 1, device)
    vcpu = FakeVcpu([OUT, OUT, InterruptedExit(errno.EINTR), OUT])
    run = Run(rig, vcpu)

    run.runner.start()
    assert vcpu.idle.wait(10)
    run.runner.stop()

    assert run.runner.join(10)
    assert device.writes == [(0, 1, 0x78)] * 3
    assert run.runner.exit_counts == {"io": 3}


def test_writes_that_kvm_kept_back_come_before_the_exit_that_followed_them(rig: Rig) -> None:
    device = RecordingDevice()
    rig.ports.add(0x80, 2, device)
    vcpu = FakeVcpu([OUT])
    vcpu.ring = [IoExit(0x81, 1, 1, True, b"a")]
    run = Run(rig, vcpu)

    run.runner.start()
    assert vcpu.idle.wait(10)
    run.runner.stop()

    assert run.runner.join(10)
    assert device.writes == [(1, 1, 0x61), (0, 1, 0x78)]


def test_guest_that_only_computes_has_what_kvm_kept_back_fetched(rig: Rig) -> None:
    """It made no exit since, nor will it: its vCPU is told to leave it for a moment."""
    written = threading.Event()
    rig.ports.add(0x81, 1, SayingDevice(written))
    vcpu = KickedVcpu()
    run = Run(rig, vcpu)
    run.runner.start()
    assert vcpu.idle.wait(10)
    assert run.runner.oldest_coalesced_write is None
    vcpu.ring = [IoExit(0x81, 1, 1, True, b"a")]

    assert run.runner.oldest_coalesced_write is not None
    run.runner.carry_out_coalesced_writes()

    assert written.wait(10)
    run.runner.stop()
    assert run.runner.join(10)
    assert run.runner.exit_counts == {}


def test_stop_from_another_thread_ends_a_guest_that_computes(rig: Rig) -> None:
    vcpu = FakeVcpu()
    run = Run(rig, vcpu)
    run.runner.start()
    assert vcpu.idle.wait(10)

    stopper = threading.Thread(target=run.runner.stop)
    stopper.start()
    stopper.join(10)

    assert run.runner.join(10)
    assert run.runner.error is None


def test_stop_from_a_handler_ends_the_loop_after_that_exit(rig: Rig) -> None:
    vcpu = FakeVcpu([ShutdownExit(), OUT])
    run = Run(rig, vcpu)
    rig.handlers.table[ShutdownExit] = (
        "shutdown",
        lambda vcpu, exit: run.stop(Outcome(TRIPLE_FAULT)),
    )

    run.runner.start()

    assert run.runner.join(10)
    assert run.runner.exit_counts == {"shutdown": 1}


def test_stop_before_start_keeps_the_guest_from_running(rig: Rig) -> None:
    run = Run(rig, FakeVcpu([OUT]))

    run.runner.stop()
    run.runner.start()

    assert run.runner.join(10)
    assert run.runner.exit_counts == {}


def test_stop_interrupts_a_thread_inside_run_with_the_kick_signal(rig: Rig) -> None:
    kicks: list[int] = []
    vcpu = FakeVcpu()
    run = Run(rig, vcpu)
    signal.signal(KICK_SIGNAL, lambda number, frame: kicks.append(number))
    run.runner.start()
    assert vcpu.idle.wait(10)

    run.runner.stop()
    run.runner.join()

    assert kicks == [KICK_SIGNAL]


def test_stop_and_join_after_the_end_or_without_a_start_do_nothing(rig: Rig) -> None:
    ended, never = Run(rig, FakeVcpu([ShutdownExit()])), Run(rig, FakeVcpu())
    ended.runner.start()
    ended.runner.stop()
    ended.runner.join()

    for runner in (ended.runner, never.runner):
        runner.stop()
        assert runner.join(10)


def test_join_with_a_timeout_says_that_the_thread_still_runs(rig: Rig) -> None:
    vcpu = FakeVcpu()
    run = Run(rig, vcpu)
    run.runner.start()

    assert not run.runner.join(0)

    run.runner.stop()
    assert run.runner.join(10)


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_exception_in_a_handler_is_kept_for_the_main_thread(rig: Rig, error: BaseException) -> None:
    def fail(vcpu: object, exit: Exit) -> None:
        raise error

    rig.handlers.table[IoExit] = ("io", fail)
    run = Run(rig, FakeVcpu([OUT]))

    run.runner.start()

    assert run.stopped.wait(10)
    assert run.runner.join(10)
    assert run.runner.error is error
    assert [outcome.exit for outcome in run.outcomes] == [INTERNAL_ERROR]


def test_failing_kvm_run_becomes_an_outcome_and_no_exception(rig: Rig) -> None:
    run = Run(rig, FakeVcpu([KvmError("KVM_RUN", errno.EFAULT, "vcpu=0, exit_reason=0")]))

    run.runner.start()

    assert run.stopped.wait(10)
    assert run.runner.join(10)
    assert run.runner.error is None
    assert run.outcomes[0].exit == INTERNAL_ERROR
    assert "vCPU 0: KVM_RUN(vcpu=0, exit_reason=0) failed: EFAULT" in run.outcomes[0].reason


def test_policy_that_ends_the_run_becomes_an_outcome_and_the_guest_runs_no_further(
    rig: Rig,
) -> None:
    vcpu = FakeVcpu([PolicyKill("policy Mine: enough"), OUT])
    run = Run(rig, vcpu)

    run.runner.start()

    assert run.runner.join(10)
    assert run.outcomes == [Outcome(KILLED, "policy Mine: enough")]
    assert run.outcomes[0].exit_status == 1
    assert run.runner.error is None
    assert run.runner.exit_counts == {}


def test_vcpu_thread_takes_the_kick_and_leaves_other_signals_to_the_main_thread(rig: Rig) -> None:
    run = Run(rig, FakeVcpu([ShutdownExit()]))
    blocked: list[set[int]] = []

    def look(vcpu: object, exit: object) -> None:
        blocked.append({int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])})
        run.stop(Outcome(TRIPLE_FAULT))

    rig.handlers.table[ShutdownExit] = ("shutdown", look)
    run.runner.start()

    assert run.runner.join(10)
    assert {signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT} <= blocked[0]
    assert KICK_SIGNAL not in blocked[0]
