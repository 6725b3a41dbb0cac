"""The embedded payload with both sides in one guest_memfd. No kernel keeps attributes in it yet:
that ioctl alone is stood in for, everything else is this host's KVM."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from kvm_bindings.x86_64 import System
from vmm.core.ranges import Range, RangeMap
from vmm.exits.outcome import FAILED, POWEROFF, Outcome
from vmm.machine import schemes
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine
from vmm.machine.schemes import GUEST_MEMFD_FLAGS, Chosen, Wanted
from vmm.memory.backings.guest_memfd import InPlaceGuestMemfdBacking
from vmm.memory.guest_memory import PageState

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

MEMORY = 32 << 20
NAME = "guest_memfd-in-place"
WATCHDOG_SECONDS = 60.0
WORDS = {0: PageState.SHARED, 8: PageState.PRIVATE}


class Attributed:
    """A guest_memfd whose attributes are noted, and mean nothing to the kernel."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.attributes = RangeMap(Range(0, size), 0)
        self.calls = 0

    def set_memory_attributes2(self, offset: int, size: int, attributes: int) -> None:
        self.calls += 1
        self.attributes.set(Range(offset, size), attributes)


def test_payload_finds_every_page_as_it_should_be_in_one_guest_memfd(
    guest_memfd_flags: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if GUEST_MEMFD_FLAGS[NAME] & ~guest_memfd_flags:
        pytest.skip(f"KVM_CAP_GUEST_MEMFD_FLAGS = {guest_memfd_flags:#x}: no INIT_SHARED")
    made: list[Attributed] = []

    def choose(system: System, wanted: Wanted) -> Chosen:
        vm = system.create_vm()
        fd = vm.create_guest_memfd(wanted.size, GUEST_MEMFD_FLAGS[NAME]).fd
        made.append(Attributed(fd, wanted.size))
        return Chosen(vm, "in-place", InPlaceGuestMemfdBacking(made[0], wanted.size), {})

    monkeypatch.setattr(schemes, "choose", choose)
    report = tmp_path / "report.json"
    machine = Machine(
        MachineConfig(memory=MEMORY, private_memory="auto", scheme="in-place", report=str(report))
    )
    watchdog = threading.Timer(WATCHDOG_SECONDS, machine.stop, [Outcome(FAILED, "watchdog")])
    watchdog.start()
    try:
        outcome = machine.run()
    finally:
        watchdog.cancel()
        watchdog.join()

    assert outcome.exit == POWEROFF
    content = json.loads(report.read_text())
    assert (content["scheme"], content["backings"]) == (
        "in-place",
        {"private": NAME, "shared": NAME},
    )
    conversions, pages = content["conversions"], content["pages"]
    changed = sum(
        tally["calls"] - tally["failed"] - tally["denied"] for tally in conversions.values()
    )
    assert 10 < made[0].calls <= changed + 2, "one for each conversion, two when it was set up"
    assert pages["private_bytes"] + pages["shared_bytes"] == MEMORY
    by_kernel = {
        state: sum(run.size for run, held in made[0].attributes.runs() if WORDS[held] is state)
        for state in WORDS.values()
    }
    assert by_kernel[PageState.PRIVATE] == pages["private_bytes"]
    assert 0 < content["residency"]["shared_bytes"] <= pages["shared_bytes"]
    assert 0 < content["residency"]["private_bytes"] <= pages["private_bytes"]
