"""Probes against a KVM that promises one thing and does another."""

from __future__ import annotations

import errno
import threading

import pytest

from kvm_bindings import KvmError, ioctls
from kvm_bindings.exits import (
    Exit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    RdmsrExit,
    ShutdownExit,
)
from kvm_bindings.x86_64 import ioctls as x86
from tests.support.fake_host import DONE, FakeHost, FakeVm
from tests.support.x86 import X86
from vmm.arch.x86_64.micro_guest import MicroGuest
from vmm.arch.x86_64.probes import cpu, events
from vmm.core.errors import HostError
from vmm.host.probes import attributes, files, memory, micro_guest
from vmm.host.probes.finding import Finding

QUICK = 0.02
NOT_EMULATED = InternalErrorExit(1, (), b"\x66\x0f\xd4\xc0")
HYPERCALL = HypercallExit(12, (0, 1, 0, 0, 0, 0), 0)
MAP_GPA_RANGE = {x86.KVM_CAP_EXIT_HYPERCALL: 1 << 12}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watchdogs that bark soon."""
    monkeypatch.setattr(micro_guest, "WATCHDOG_SECONDS", QUICK)


# -- the runner -----------------------------------------------------------------------------------


def test_guest_that_never_exits_is_stopped_and_its_vm_closed() -> None:
    host = FakeHost()
    threads = threading.active_count()

    with MicroGuest(host.as_system(), b"", seconds=QUICK) as guest:
        exit = guest.run()

    assert exit == InterruptedExit(errno.EINTR)
    assert host.closed_vms == 1
    assert threading.active_count() == threads


def test_ctrl_c_while_the_watchdog_starts_leaves_no_watchdog_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Timer.start

    def interrupted(timer: threading.Timer) -> None:
        start(timer)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", interrupted)
    host = FakeHost()
    threads = threading.active_count()

    with pytest.raises(KeyboardInterrupt), MicroGuest(host.as_system(), b"") as guest:
        guest.run()

    assert threading.active_count() == threads


def test_signal_that_is_not_the_watchdogs_does_not_end_the_guest() -> None:
    host = FakeHost(InterruptedExit(errno.EINTR), DONE)

    with MicroGuest(host.as_system(), b"") as guest:
        assert guest.run() == DONE


def test_vm_is_closed_when_its_vcpu_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeVm, vcpu_id: int) -> None:
        raise KvmError("KVM_CREATE_VCPU", errno.ENOMEM)

    monkeypatch.setattr(FakeVm, "create_vcpu", refuse)
    host = FakeHost()

    with pytest.raises(KvmError, match="KVM_CREATE_VCPU"):
        MicroGuest(host.as_system(), b"")

    assert host.closed_vms == 1


# -- the processor --------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("probe", [cpu.kernel_mode, cpu.user_mode])
@pytest.mark.parametrize(
    ("exits", "status", "result"),
    [
        ([DONE], "yes", "runs natively"),
        ([NOT_EMULATED], "broken", "is interpreted"),
        ([ShutdownExit()], "broken", "fails"),
        ([], "broken", "hangs"),
    ],
)
def test_mode_is_judged_by_what_its_code_does(
    probe: object, exits: list[Exit], status: str, result: str
) -> None:
    finding = probe(FakeHost(*exits).as_system())  # type: ignore[operator]

    assert (finding.status, finding.result) == (status, result)


def test_interpretation_names_the_instruction() -> None:
    finding = cpu.kernel_mode(FakeHost(NOT_EMULATED).as_system())

    assert "emulator met paddq (66 0f d4 c0) in long mode at CPL 0" in finding.evidence
    assert finding.data == {"behaviour": "interpreted", "instruction": "paddq"}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("exits", "status", "behaviour"),
    [([HYPERCALL], "yes", "exits"), ([DONE], "broken", "returns"), ([], "broken", "hangs")],
)
def test_hypercall_is_judged_by_what_it_does(
    exits: list[Exit], status: str, behaviour: str
) -> None:
    finding = cpu.hypercall_exits(FakeHost(*exits, capabilities=MAP_GPA_RANGE).as_system())

    assert (finding.status, finding.data["behaviour"]) == (status, behaviour)
    assert "KVM_CAP_EXIT_HYPERCALL = 0x1000; a vmmcall at CPL 0" in finding.evidence


def test_hypercall_that_is_not_offered_is_not_tried() -> None:
    finding = cpu.hypercall_exits(FakeHost().as_system())

    assert (finding.status, finding.data["behaviour"]) == ("no", "absent")


@pytest.mark.parametrize(
    ("exits", "status"),
    [
        ([RdmsrExit(0xC001_0131, 2), IoExit(0x10, 1, 1, True, b"\x5a")], "yes"),
        ([RdmsrExit(0xC001_0131, 2), DONE], "broken"),
        ([ShutdownExit()], "broken"),
    ],
)
def test_msr_must_exit_and_its_answer_arrive(exits: list[Exit], status: str) -> None:
    assert cpu.user_space_msrs(FakeHost(*exits).as_system()).status == status


def test_alias_whose_write_goes_nowhere_is_broken() -> None:
    finding = cpu.c_bit(FakeHost(DONE).as_system())

    assert (finding.status, finding.result) == ("broken", "bit 38 is ignored")
    assert finding.data == {"maxphyaddr": 40, "bit": 38}


def test_address_width_without_room_for_a_c_bit_is_a_host_error() -> None:
    host = FakeHost()
    host.cpuid = [(0x8000_0008, 0, 0, 32, 0, 0, 0)]

    with pytest.raises(HostError, match="MAXPHYADDR 32"):
        cpu.c_bit(host.as_system())


def test_cpuid_without_kvms_leaf_cannot_announce() -> None:
    host = FakeHost()
    host.cpuid = [(0, 0, 0, 1, 0, 0, 0)]

    assert cpu.share_announcement(host.as_system()).status == "no"


@pytest.mark.usefixtures("impatient")
def test_latency_of_a_guest_that_stops_is_no_figure() -> None:
    finding = cpu.exit_latency(FakeHost(DONE, DONE).as_system())

    assert (finding.status, finding.evidence) == ("broken", "a guest made 2 of 300 exits")


# -- memory ---------------------------------------------------------------------------------------


def test_vm_types_are_those_that_can_be_created() -> None:
    host = FakeHost()

    assert memory.vm_types(X86, host.as_system()).status == "no"
    host.vm_types = {0, 1}
    assert memory.vm_types(X86, host.as_system()).result == "default, sw-protected"


def word(value: int) -> IoExit:
    """A micro-guest says what it has read."""
    return IoExit(0x10, 4, 1, True, value.to_bytes(4, "little"))


FILES_WORD, GUEST_WORD = 0x4452_4853, 0x5453_4547


def attributes_of(*exits: Exit) -> Finding:
    host = FakeHost(*exits, capabilities={ioctls.KVM_CAP_MEMORY_ATTRIBUTES: 8})
    host.vm_types = {0, 1}
    host.guest_memfds = True
    return attributes.memory_attributes(X86, host.as_system())


def test_attributes_that_pick_the_side_work() -> None:
    finding = attributes_of(word(FILES_WORD), word(0), word(GUEST_WORD))

    assert (finding.status, finding.result) == ("yes", "on default VMs")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("exits", "result"),
    [
        ([word(FILES_WORD), word(FILES_WORD), word(GUEST_WORD)], "sides mix"),
        ([word(FILES_WORD), word(0), word(0)], "sides mix"),
        ([word(FILES_WORD), MemoryFaultExit(8, 0x20_0000, 4096, errno.EFAULT)], "faults"),
        ([], "faults"),
    ],
)
def test_attributes_that_do_not_are_broken(exits: list[Exit], result: str) -> None:
    finding = attributes_of(*exits)

    assert (finding.status, finding.result) == ("broken", result)


def test_attributes_that_no_vm_type_has_are_missing() -> None:
    host = FakeHost(capabilities={ioctls.KVM_CAP_MEMORY_ATTRIBUTES: 0})
    host.vm_types = {0, 1}

    finding = attributes.memory_attributes(X86, host.as_system())

    assert finding.status == "no"
    assert "on a sw-protected VM" in finding.evidence


FAULT = MemoryFaultExit(0, 0x20_0000, 4096, errno.EFAULT)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("exits", "status", "result"),
    [
        ([FAULT, DONE], "yes", "exit, and go on"),
        ([FAULT, FAULT], "broken", "can't be answered"),
        ([DONE], "broken", "don't exit"),
        ([], "broken", "don't exit"),
    ],
)
def test_memory_fault_must_exit_and_be_answerable(
    exits: list[Exit], status: str, result: str
) -> None:
    host = FakeHost(*exits)
    host.guest_memfds = True

    finding = attributes.memory_faults(X86, host.as_system())

    assert (finding.status, finding.result) == (status, result)


def test_memory_fault_that_nothing_can_provoke_is_unknown() -> None:
    assert attributes.memory_faults(X86, FakeHost().as_system()).status == "unknown"
    host = FakeHost(capabilities={ioctls.KVM_CAP_MEMORY_FAULT_INFO: 0})
    assert attributes.memory_faults(X86, host.as_system()).status == "no"


def test_in_place_conversion_that_no_vm_type_has_is_missing() -> None:
    finding = attributes.in_place(X86, FakeHost().as_system())

    assert finding.status == "no"
    assert "KVM_CREATE_VM(type=1) failed: EINVAL" in finding.evidence


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("exits", "status"),
    [([word(0), word(0)], "yes"), ([word(0), word(1)], "broken"), ([], "broken")],
)
def test_file_behind_a_memslot_must_serve_and_be_emptied(exits: list[Exit], status: str) -> None:
    assert files.sealed_memfd(X86, FakeHost(*exits).as_system()).status == status


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_guest_memfd_that_is_refused_says_with_which_flags(flags: int) -> None:
    finding = memory.guest_memfd(X86, flags, FakeHost().as_system())

    assert finding.status == "no"
    assert f"flags={flags:#x}) failed: EINVAL" in finding.evidence


# -- events ---------------------------------------------------------------------------------------


def test_coalesced_write_must_be_in_the_ring_and_not_exit() -> None:
    host = FakeHost(DONE)
    host.ring = [IoExit(0x70, 1, 1, True, b"\x5a")]

    assert events.coalesced_ports(host.as_system()).status == "yes"
    assert events.coalesced_ports(FakeHost(DONE).as_system()).status == "broken"
    exited = FakeHost(IoExit(0x70, 1, 1, True, b"\x5a"))
    assert events.coalesced_ports(exited.as_system()).status == "broken"


def test_coalescing_that_is_not_offered_is_missing() -> None:
    host = FakeHost()
    host.coalesces = False

    assert events.coalesced_ports(host.as_system()).status == "no"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("exits", [[DONE], [DONE, IoExit(0x11, 1, 1, True, b"\0")], []])
def test_eventfds_that_stay_silent_are_broken(exits: list[Exit]) -> None:
    assert events.ioeventfd(FakeHost(*exits).as_system()).status == "broken"
    assert events.irqfd_resample(FakeHost(*exits).as_system()).status == "broken"
