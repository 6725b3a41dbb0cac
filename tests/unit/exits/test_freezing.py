"""Standing still for a debugger: nobody in the guest, and nothing left to complete."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest

from kvm_bindings import Vcpu
from kvm_bindings.exits import Exit, HypercallExit, InterruptedExit, IoExit
from tests.support.fake_vcpu import FakeVcpu, Rig
from vmm.exits.run_loop import MOST_TO_SETTLE, install_kick_handler
from vmm.exits.vcpu_group import VcpuGroup

OUT = IoExit(0x80, 1, 1, True, b"x")
CALL = HypercallExit(12, (0, 0, 0, 0, 0, 0), 0)
SECONDS = 10


class CompletingVcpu(FakeVcpu):
    """KVM_RUN with immediate_exit set first completes the last exit: `fragments` more of it."""

    def __init__(self, *steps: Exit, fragments: int = 0, index: int = 0) -> None:
        super().__init__(steps, index)
        self.fragments = fragments
        self.completions = 0
        self._open = False

    def run(self) -> Exit:
        if self.immediate_exit and self._open:
            self.completions += 1
            if self.fragments:
                self.fragments -= 1
                return OUT
            self._open = False
            return InterruptedExit(4)
        exit = super().run()
        self._open = not isinstance(exit, InterruptedExit)
        return exit


class Guest:
    def __init__(self, rig: Rig) -> None:
        install_kick_handler()
        self.rig = rig
        self.group = VcpuGroup()

    def add(self, *vcpus: FakeVcpu) -> None:
        for vcpu in vcpus:
            self.group.add(cast(Vcpu, vcpu), self.rig.handlers, lambda outcome: None)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest(Rig())
    yield made
    made.group.stop()
    assert made.group.join(SECONDS)
    made.rig.close()


def test_frozen_vcpus_enter_no_guest_until_thawed(guest: Guest) -> None:
    vcpus = [FakeVcpu(index=0), FakeVcpu(index=1)]
    guest.add(*vcpus)

    guest.group.freeze()
    guest.group.start()
    assert guest.group.wait_until_still(SECONDS)
    assert guest.group.frozen and not any(vcpu.idle.is_set() for vcpu in vcpus)
    guest.group.thaw()

    assert all(vcpu.idle.wait(SECONDS) for vcpu in vcpus)
    assert not guest.group.frozen


def test_vcpu_that_stays_is_let_go_by_the_next_thaw(guest: Guest) -> None:
    vcpus = [FakeVcpu(index=0), FakeVcpu(index=1)]
    guest.add(*vcpus)
    guest.group.freeze()
    guest.group.start()

    guest.group.thaw([guest.group.runners[1]])
    assert vcpus[0].idle.wait(SECONDS)
    assert not vcpus[1].idle.wait(0.05)
    guest.group.freeze()
    guest.group.thaw()

    assert vcpus[1].idle.wait(SECONDS)


def test_freezing_from_a_handler_waits_for_nobody_and_completes_its_exit(guest: Guest) -> None:
    vcpu = CompletingVcpu(CALL)
    guest.rig.handlers.table[HypercallExit] = ("hypercall", lambda *_: guest.group.freeze())
    guest.add(vcpu)

    guest.group.start()

    assert _frozen_and_still(guest)
    assert vcpu.completions == 1
    assert guest.group.is_still(guest.group.runners[0])


def test_exit_in_many_parts_is_completed_by_its_handler(guest: Guest) -> None:
    vcpu = CompletingVcpu(CALL, fragments=3)
    guest.rig.handlers.table[HypercallExit] = ("hypercall", lambda *_: guest.group.freeze())
    guest.add(vcpu)

    guest.group.start()

    assert _frozen_and_still(guest)
    assert guest.group.runners[0].exit_counts == {"hypercall": 1, "io": 3}


def test_exit_without_an_end_does_not_keep_its_vcpu_from_standing_still(guest: Guest) -> None:
    vcpu = CompletingVcpu(CALL, fragments=1 << 40)
    guest.rig.handlers.table[HypercallExit] = ("hypercall", lambda *_: guest.group.freeze())
    guest.add(vcpu)

    guest.group.start()

    assert _frozen_and_still(guest)
    assert vcpu.completions == MOST_TO_SETTLE
    assert not guest.group.is_still(guest.group.runners[0])


def test_vcpu_in_a_handler_is_not_still_yet(guest: Guest) -> None:
    inside, leave = threading.Event(), threading.Event()

    def handle(vcpu: object, exit: object) -> None:
        inside.set()
        assert leave.wait(SECONDS)

    guest.rig.handlers.table[HypercallExit] = ("hypercall", handle)
    guest.add(FakeVcpu([CALL]))
    guest.group.start()
    assert inside.wait(SECONDS)

    guest.group.freeze()

    assert not guest.group.wait_until_still(0)
    assert not guest.group.is_still(guest.group.runners[0])
    leave.set()
    assert guest.group.wait_until_still(SECONDS)


def test_pause_and_freeze_each_hold_until_both_are_over(guest: Guest) -> None:
    vcpu = FakeVcpu()
    guest.add(vcpu)
    guest.group.freeze()
    guest.group.start()
    guest.group.pause()

    guest.group.thaw()
    assert not vcpu.idle.wait(0.05)
    guest.group.resume()

    assert vcpu.idle.wait(SECONDS)


def test_thaw_tells_guests_that_they_were_stopped(guest: Guest) -> None:
    vcpu = FakeVcpu()
    guest.add(vcpu)
    guest.group.start()
    assert vcpu.idle.wait(SECONDS)

    guest.group.freeze()
    assert guest.group.wait_until_still(SECONDS)
    guest.group.thaw()

    assert vcpu.told_stopped == 1


def test_frozen_vcpus_end_when_told_to(guest: Guest) -> None:
    guest.add(FakeVcpu(), FakeVcpu(index=1))
    guest.group.freeze()
    guest.group.start()
    guest.group.thaw([guest.group.runners[1]])

    guest.group.stop()

    assert guest.group.join(SECONDS)


def _frozen_and_still(guest: Guest) -> bool:
    """The vCPU's own handler freezes all; it is at the gate then."""
    while not guest.group.frozen:
        guest.group.join(0.001)
    return guest.group.wait_until_still(SECONDS)
