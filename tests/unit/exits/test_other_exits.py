"""Hypercalls, MSRs, MMIO, and every exit that ends a run."""

from __future__ import annotations

import errno
import re
from typing import Any

import pytest

from kvm_bindings import exits
from tests.support.conversion import Answering
from tests.support.fake_vcpu import PRIVATE_START, RAM, FakeVcpu, RecordingDevice, Rig
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.core.ranges import PAGE_SIZE
from vmm.exits import outcome as words
from vmm.memory.guest_memory import PageState
from vmm.policy import Deny, Event, Policy, PolicyError, View

MAP_GPA_RANGE = 12
PRIVATE = 1 << 4


def call(number: int, *args: int) -> exits.HypercallExit:
    a = (*args, 0, 0, 0, 0, 0, 0)
    return exits.HypercallExit(number, (a[0], a[1], a[2], a[3], a[4], a[5]), 0)


# -- hypercalls -----------------------------------------------------------------------------------


def test_share_hypercall_is_carried_out_and_answered(rig: Rig) -> None:
    vcpu = rig.handle(call(MAP_GPA_RANGE, PRIVATE_START, 4, 0))

    assert vcpu.hypercalls == [0]
    assert rig.memory.bytes_in(PageState.SHARED) == PRIVATE_START + 4 * PAGE_SIZE


def test_unshare_hypercall_is_carried_out_and_answered(rig: Rig) -> None:
    vcpu = rig.handle(call(MAP_GPA_RANGE, 0, 1, PRIVATE))

    assert vcpu.hypercalls == [0]
    assert rig.memory.bytes_in(PageState.SHARED) == PRIVATE_START - PAGE_SIZE


@pytest.mark.parametrize("number", [0, 1, 11, 13, 2**64 - 1])
def test_unknown_hypercall_answers_enosys(rig: Rig, number: int) -> None:
    vcpu = rig.handle(call(number, PRIVATE_START, 1, 0))

    assert vcpu.hypercalls == [-errno.ENOSYS]
    assert rig.converter.accounting.share.calls == 0


@pytest.mark.parametrize(
    ("gpa", "pages", "attributes"),
    [
        (PRIVATE_START + 1, 1, 0),
        (PRIVATE_START, 0, 0),
        (0, 1 << 52, 0),
        (2**64 - PAGE_SIZE, 2, 0),
        (RAM, 1, 0),
        (RAM - PAGE_SIZE, 2, PRIVATE),
        (PRIVATE_START, 1, 1 << 5),
        (PRIVATE_START, 1, 3),
    ],
    ids=[
        "unaligned",
        "no pages",
        "size past 64 bits",
        "wraps around",
        "beyond RAM",
        "half beyond RAM",
        "reserved bit",
        "undefined page size",
    ],
)
def test_refused_hypercall_answers_einval_and_changes_nothing(
    rig: Rig, gpa: int, pages: int, attributes: int
) -> None:
    before = rig.memory.states()

    vcpu = rig.handle(call(MAP_GPA_RANGE, gpa, pages, attributes))

    assert vcpu.hypercalls == [-errno.EINVAL]
    assert rig.memory.states() == before


def test_hypercall_on_an_ordinary_vm_answers_eopnotsupp(ordinary_rig: Rig) -> None:
    vcpu = ordinary_rig.handle(call(MAP_GPA_RANGE, 0, 1, 0))

    assert vcpu.hypercalls == [-errno.EOPNOTSUPP]


def test_hypercall_that_the_policy_denies_answers_the_policys_errno() -> None:
    class NoShare(Policy):
        def on_share(self, event: Event, view: View) -> Deny:
            return Deny(errno.EPERM)

    rig = Rig(policy=NoShare())

    vcpu = rig.handle(call(MAP_GPA_RANGE, PRIVATE_START, 1, 0))

    rig.close()
    assert vcpu.hypercalls == [-errno.EPERM]


# -- model-specific registers, MMIO ---------------------------------------------------------------


def test_known_msr_is_read(rig: Rig) -> None:
    assert rig.handle(exits.RdmsrExit(0xC001_0131, 1)).msrs == [(1, True)]


def test_unknown_msr_read_is_a_general_protection_fault(rig: Rig) -> None:
    assert rig.handle(exits.RdmsrExit(0x1234, 1)).msrs == [(None, False)]


def test_known_msr_is_written(rig: Rig) -> None:
    assert rig.handle(exits.WrmsrExit(0x4B56_4D08, 1, 1)).msrs == [(None, True)]

    assert rig.msrs.migration_ready


@pytest.mark.parametrize(("index", "value"), [(0x1234, 0), (0x4B56_4D08, 2)])
def test_refused_msr_write_is_a_general_protection_fault(rig: Rig, index: int, value: int) -> None:
    assert rig.handle(exits.WrmsrExit(index, value, 1)).msrs == [(None, False)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_read_where_nothing_is_gives_all_ones(rig: Rig, size: int) -> None:
    assert rig.handle(exits.MmioExit(0xD000_0000, size, False, b"")).mmio == [b"\xff" * size]


def test_mmio_reaches_the_device_with_offset_and_size(rig: Rig) -> None:
    device = RecordingDevice([0x1122_3344_5566_7788])
    rig.registers.add(0xE000_0000, 0x1000, device)

    vcpu = rig.handle(exits.MmioExit(0xE000_0010, 8, False, b""))
    rig.handle(exits.MmioExit(0xE000_0FFC, 4, True, b"\1\2\3\4"))

    assert vcpu.mmio == [bytes.fromhex("8877665544332211")]
    assert device.reads == [(0x10, 8)]
    assert device.writes == [(0xFFC, 4, 0x0403_0201)]


def test_mmio_write_where_nothing_is_vanishes(rig: Rig) -> None:
    vcpu = rig.handle(exits.MmioExit(0xD000_0000, 4, True, b"abcd"))

    assert vcpu.mmio == []
    assert rig.outcomes == []


def test_policy_that_raises_leaves_the_hypercall_unanswered() -> None:
    """The guest must not run on with an answer that nobody gave."""
    rig, vcpu = Rig(policy=Answering(ZeroDivisionError())), FakeVcpu()

    with pytest.raises(PolicyError, match=r"on_share.*raised ZeroDivisionError"):
        rig.handle(call(MAP_GPA_RANGE, PRIVATE_START, 4, 0), vcpu)

    rig.close()
    assert vcpu.hypercalls == []


# -- implicit conversions -------------------------------------------------------------------------


@pytest.fixture
def faulting_rig(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A machine whose scheme takes a fault for a request."""
    monkeypatch.setattr(CbitScheme, "converts_on_fault", True)
    return rig


def test_fault_on_a_page_in_the_other_state_converts_it_and_the_guest_goes_on(
    faulting_rig: Rig,
) -> None:
    faulting_rig.handle(exits.MemoryFaultExit(0, PRIVATE_START, 0x1000, errno.EFAULT))
    faulting_rig.handle(exits.MemoryFaultExit(8, 0x4000, 0x1000, errno.EFAULT))

    assert faulting_rig.outcomes == []
    counts = faulting_rig.converter.accounting.as_dict()
    assert counts["share"]["bytes"] == counts["unshare"]["bytes"] == 0x1000


def test_fault_that_a_policy_refuses_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CbitScheme, "converts_on_fault", True)
    rig = Rig(policy=Answering(Deny(errno.EPERM)))

    rig.handle(exits.MemoryFaultExit(8, 0x4000, 0x1000, errno.EFAULT), FakeVcpu(index=1))

    rig.close()
    assert [outcome.exit for outcome in rig.outcomes] == [words.FAILED]
    assert re.search(r"private memory at GPA 0x4000.*unshare.*EPERM", rig.outcomes[0].reason)


def test_broken_host_memory_is_no_request(faulting_rig: Rig) -> None:
    hwpoison = 133  # EHWPOISON is not in Python's errno
    faulting_rig.handle(exits.MemoryFaultExit(8, 0x4000, 0x1000, hwpoison))

    assert [outcome.exit for outcome in faulting_rig.outcomes] == [words.INTERNAL_ERROR]
    assert faulting_rig.converter.accounting.unshare.calls == 0


# -- endings --------------------------------------------------------------------------------------

ENDINGS = [
    (
        exits.MemoryFaultExit(8, 0x4000, 0x1000, errno.EFAULT),
        words.INTERNAL_ERROR,
        "private memory at GPA 0x4000, 4096 bytes",
    ),
    (
        exits.MemoryFaultExit(0, 0x4000, 0x1000, errno.EFAULT),
        words.INTERNAL_ERROR,
        "shared memory at GPA 0x4000",
    ),
    (exits.SystemEventExit(1, ()), words.POWEROFF, "shutdown"),
    (exits.SystemEventExit(2, ()), words.RESET, "reset"),
    (exits.SystemEventExit(3, ()), words.PANIC, "crash"),
    (exits.SystemEventExit(99, ()), words.FAILED, "event 99"),
    (exits.ShutdownExit(), words.TRIPLE_FAULT, "triple fault on vCPU 1"),
    (exits.HltExit(), words.FAILED, "vCPU 1 halted"),
    (exits.FailEntryExit(0x80000021, 0), words.INTERNAL_ERROR, "0x80000021"),
    (
        exits.InternalErrorExit(1, (4,), bytes.fromhex("c4e2f9f7")),
        words.INTERNAL_ERROR,
        r"could not emulate the instruction at RIP 0x1234 \(c4 e2 f9 f7\).*pyvmm lab",
    ),
    (exits.InternalErrorExit(1, (), b""), words.INTERNAL_ERROR, "unknown bytes"),
    (
        exits.InternalErrorExit(3, (0x10, 0x20), b""),
        words.INTERNAL_ERROR,
        r"internal error 3 at RIP 0x1234, data \[0x10, 0x20\]",
    ),
    (exits.UnknownExit(27, bytes(256)), words.INTERNAL_ERROR, r"KVM exit 27 \(hyperv\)"),
    (exits.UnknownExit(4711, bytes(256)), words.INTERNAL_ERROR, r"4711"),
]


@pytest.mark.parametrize(("exit", "word", "reason"), ENDINGS)
def test_ending_exit_stops_the_run_with_its_outcome(
    rig: Rig, exit: Any, word: str, reason: str
) -> None:
    rig.handle(exit, FakeVcpu(index=1))

    assert [outcome.exit for outcome in rig.outcomes] == [word]
    assert re.search(reason, rig.outcomes[0].reason)


def test_every_exit_class_but_the_interrupted_one_has_a_handler(rig: Rig) -> None:
    classes = {
        value
        for name, value in vars(exits).items()
        if name.endswith("Exit") and isinstance(value, type)
    }

    arm64s = {exits.ArmNisvExit, exits.ArmDebugExit}
    assert set(rig.handlers.table) == classes - {exits.InterruptedExit} - arm64s


@pytest.mark.parametrize(
    ("word", "status"),
    [
        (words.POWEROFF, 0),
        (words.RESET, 0),
        (words.QUIT, 0),
        (words.PANIC, 1),
        (words.FAILED, 1),
        (words.TRIPLE_FAULT, 1),
        (words.INTERNAL_ERROR, 1),
        (words.STOPPED, 1),
    ],
)
def test_outcome_word_has_its_exit_status(word: str, status: int) -> None:
    assert words.Outcome(word).exit_status == status
