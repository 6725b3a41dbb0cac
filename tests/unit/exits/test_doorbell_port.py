"""The port doorbell through the exit handler: conversions, host check, failure, nonsense."""

from __future__ import annotations

import errno

import pytest

from kvm_bindings.exits import IoExit
from tests.support.fake_vcpu import PRIVATE_START, RAM, FakeVcpu, Rig
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.host_check import GUEST_PATTERN, HOST_PATTERN, LARGEST_CHECK, host_check, pattern
from vmm.exits.outcome import FAILED, Outcome
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState

PORT = 0x500
FRAME, PAGES, COMMAND, RESULT, FAILURE = (PORT + n for n in (0x00, 0x04, 0x08, 0x0C, 0x10))
SHARE, UNSHARE, HOST_CHECK = 1, 2, 3


def out(rig: Rig, port: int, value: int, vcpu: FakeVcpu | None = None) -> None:
    rig.handle(IoExit(port, 4, 1, True, value.to_bytes(4, "little")), vcpu)


def read(rig: Rig, port: int, size: int = 4, count: int = 1, index: int = 0) -> bytes:
    return rig.handle(IoExit(port, size, count, False, b""), FakeVcpu(index=index)).io[0]


def ring(rig: Rig, command: int, gpa: int, pages: int, index: int = 0) -> int:
    """What a guest does; the result that it reads, as a signed number."""
    vcpu = FakeVcpu(index=index)
    out(rig, FRAME, gpa // PAGE_SIZE, vcpu)
    out(rig, PAGES, pages, vcpu)
    out(rig, COMMAND, command, vcpu)
    return int.from_bytes(read(rig, RESULT, index=index), "little", signed=True)


def state_of(rig: Rig, gpa: int) -> PageState:
    return rig.memory.states(Range(gpa, PAGE_SIZE))[0][1]


def test_share_command_shares_the_latched_range(rig: Rig) -> None:
    assert ring(rig, SHARE, PRIVATE_START, 2) == 0

    assert state_of(rig, PRIVATE_START + PAGE_SIZE) is PageState.SHARED
    assert state_of(rig, PRIVATE_START + 2 * PAGE_SIZE) is PageState.PRIVATE


def test_unshare_command_makes_the_latched_range_private(rig: Rig) -> None:
    assert ring(rig, UNSHARE, 0, 1) == 0

    assert state_of(rig, 0) is PageState.PRIVATE


@pytest.mark.parametrize(
    ("gpa", "pages", "number"),
    [
        (PRIVATE_START, 0, errno.EINVAL),
        (RAM, 1, errno.EINVAL),
        (RAM - PAGE_SIZE, 2, errno.EINVAL),
        (0xFFFF_FFFF * PAGE_SIZE, 0xFFFF_FFFF, errno.EINVAL),
    ],
)
def test_refused_share_answers_its_errno(rig: Rig, gpa: int, pages: int, number: int) -> None:
    assert ring(rig, SHARE, gpa, pages) == -number


@pytest.mark.parametrize("command", [0, 4, 0xFFFF_FFFF])
def test_unknown_command_answers_enosys(rig: Rig, command: int) -> None:
    assert ring(rig, command, 0, 1) == -errno.ENOSYS


def test_result_of_one_vcpu_is_not_seen_by_another(rig: Rig) -> None:
    assert ring(rig, SHARE, RAM, 1, index=1) == -errno.EINVAL

    assert read(rig, RESULT, index=0) == b"\0\0\0\0"


def test_failure_register_ends_the_run_with_the_guests_code(rig: Rig) -> None:
    out(rig, FAILURE, 7)

    assert rig.outcomes == [Outcome(FAILED, "the guest reported failure code 7")]


def test_failure_register_works_on_an_ordinary_vm_too(ordinary_rig: Rig) -> None:
    out(ordinary_rig, FAILURE, 7)

    assert [outcome.exit for outcome in ordinary_rig.outcomes] == [FAILED]


def test_failure_code_zero_ends_nothing(rig: Rig) -> None:
    out(rig, FAILURE, 0)

    assert rig.outcomes == []


@pytest.mark.parametrize(("size", "data"), [(1, b"\x01"), (2, b"\x01\x00")])
def test_command_of_another_size_does_nothing(rig: Rig, size: int, data: bytes) -> None:
    out(rig, PAGES, 1)

    rig.handle(IoExit(COMMAND, size, 1, True, data))

    assert rig.converter.accounting.share.calls == 0


@pytest.mark.parametrize(
    ("port", "size"), [(COMMAND, 1), (COMMAND, 2), (COMMAND + 1, 4), (PORT + 0x1C, 4)]
)
def test_read_where_there_is_no_register_gives_all_ones(rig: Rig, port: int, size: int) -> None:
    assert read(rig, port, size) == b"\xff" * size


def test_string_read_repeats_the_register(rig: Rig) -> None:
    assert read(rig, COMMAND, 4, 3) == b"VMMB" * 3


def test_string_write_is_taken_item_by_item(rig: Rig) -> None:
    frames = b"".join(n.to_bytes(4, "little") for n in (5, 6, 7))

    rig.handle(IoExit(FRAME, 4, 3, True, frames))

    assert read(rig, FRAME) == (7).to_bytes(4, "little")


def test_ordinary_vm_has_no_doorbell(ordinary_rig: Rig) -> None:
    assert read(ordinary_rig, COMMAND) == b"\xff\xff\xff\xff"


# -- host check -----------------------------------------------------------------------------------


def test_host_check_replaces_the_guests_pattern_by_the_hosts(rig: Rig) -> None:
    rig.memory.pwrite(pattern(0x3000, 0x2000, GUEST_PATTERN), 0x3000)

    assert ring(rig, HOST_CHECK, 0x3000, 2) == 0

    assert rig.memory.pread(0x2000, 0x3000) == pattern(0x3000, 0x2000, HOST_PATTERN)


def test_pattern_is_gpa_xor_key_in_each_little_endian_word() -> None:
    words = pattern(0x1000, 24, GUEST_PATTERN)

    expected = [(0x1000 + n) ^ 0x5041594C4F414421 for n in (0, 8, 16)]
    assert [int.from_bytes(words[n : n + 8], "little") for n in (0, 8, 16)] == expected


def test_host_check_of_other_bytes_answers_eio_and_writes_nothing(rig: Rig) -> None:
    wrong = bytearray(pattern(0x3000, 0x1000, GUEST_PATTERN))
    wrong[-1] ^= 1
    rig.memory.pwrite(wrong, 0x3000)

    assert ring(rig, HOST_CHECK, 0x3000, 1) == -errno.EIO

    assert rig.memory.pread(0x1000, 0x3000) == wrong


@pytest.mark.parametrize(
    ("gpa", "size", "number"),
    [
        (0, 0, errno.EINVAL),
        (RAM, 0x1000, errno.EINVAL),
        (RAM - 0x1000, 0x2000, errno.EINVAL),
        (PRIVATE_START, 0x1000, errno.EACCES),
        (PRIVATE_START - 0x1000, 0x2000, errno.EACCES),
    ],
    ids=["nothing", "no RAM", "half RAM", "private", "half private"],
)
def test_host_check_refuses_with_its_errno(rig: Rig, gpa: int, size: int, number: int) -> None:
    assert host_check(rig.memory, gpa, size) == -number


@pytest.mark.parametrize(
    ("size", "result"), [(LARGEST_CHECK, 0), (LARGEST_CHECK + 8, -errno.EINVAL)]
)
def test_host_check_has_an_upper_limit(size: int, result: int) -> None:
    ram = Range(0, 2 * LARGEST_CHECK)
    memory = GuestMemory([ram], MemfdBacking(ram.size))
    memory.pwrite(pattern(0, size, GUEST_PATTERN), 0)

    answer = host_check(memory, 0, size)

    memory.close()
    assert answer == result
