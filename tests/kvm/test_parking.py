"""Parking real vCPUs: one that computes or exits all the time, beside two that nobody started."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvm_bindings.x86_64 import System
from tests.support.fake_vcpu import RecordingDevice, Rig
from tests.support.tiny_guest import TinyGuest
from vmm.exits.outcome import Outcome
from vmm.exits.run_loop import install_kick_handler
from vmm.exits.vcpu_group import VcpuGroup

pytestmark = pytest.mark.kvm

COUNTER = 0x2000
COMPUTING = bytes.fromhex("66ff060020 ebf9")  # inc dword [0x2000]; jmp back
CHATTING = bytes.fromhex("66ff060020 e610 ebf7")  # inc dword [0x2000]; out 0x10, al; jmp back
PORT = 0x10
SECONDS = 10


class Guest:
    """vCPU 0 counts in memory; vCPUs 1 and 2 wait inside KVM_RUN for an INIT that never comes."""

    def __init__(self, tiny: TinyGuest) -> None:
        install_kick_handler()
        self.tiny = tiny
        self.rig = Rig(private=False)
        self.rig.ports.add(PORT, 1, RecordingDevice())
        self.others = [tiny.vm.create_vcpu(1), tiny.vm.create_vcpu(2)]
        self.group = VcpuGroup()
        self.outcomes: list[Outcome] = []
        for vcpu in (tiny.vcpu, *self.others):
            self.group.add(vcpu, self.rig.handlers, self.stop)

    def stop(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.group.stop()

    def count(self) -> int:
        return int.from_bytes(self.tiny.pread(4, COUNTER), "little")

    def wait_until_it_counts(self) -> None:
        """It runs, however slow the machine is: the test's time limit ends the wait."""
        before = self.count()
        while self.count() == before:
            threading.Event().wait(0.001)

    def close(self) -> None:
        self.group.stop()
        assert self.group.join(SECONDS)
        for vcpu in self.others:
            vcpu.close()
        self.rig.close()


@pytest.fixture(params=[COMPUTING, CHATTING], ids=["computing", "chatting"])
def guest(kvm: System, request: pytest.FixtureRequest) -> Iterator[Guest]:
    with TinyGuest(kvm, request.param, irqchip=True) as tiny:
        made = Guest(tiny)
        made.group.start()
        made.wait_until_it_counts()
        yield made
        made.close()
        assert made.outcomes == []


def test_parked_guest_changes_no_memory_and_goes_on_afterwards(guest: Guest) -> None:
    for _ in range(20):
        with guest.group.parked():
            before = guest.count()
            threading.Event().wait(0.002)
            assert guest.count() == before
        guest.wait_until_it_counts()


def test_paused_guest_stands_still_until_it_is_resumed(guest: Guest) -> None:
    guest.group.pause()
    before = guest.count()
    threading.Event().wait(0.02)
    assert guest.count() == before

    guest.group.resume()

    guest.wait_until_it_counts()


def test_paused_guest_can_be_stopped(guest: Guest) -> None:
    guest.group.pause()

    guest.group.stop()

    assert guest.group.join(SECONDS)
