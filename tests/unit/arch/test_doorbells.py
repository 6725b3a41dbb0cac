"""Both doorbells: what they decode, and that no guest input raises."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.arch.x86_64.doorbells import (
    Failure,
    HostCheck,
    PortDoorbell,
    decode_map_gpa_range,
)
from vmm.core.events import ConversionRequest, Kind


def ring(doorbell: PortDoorbell, command: int, frame: int, pages: int, vcpu: int = 0) -> object:
    """What a guest does: two latches, then the command register."""
    assert doorbell.write(vcpu, 0x00, 4, frame) is None
    assert doorbell.write(vcpu, 0x04, 4, pages) is None
    return doorbell.write(vcpu, 0x08, 4, command)


def u32(result: int) -> int:
    return result & 0xFFFF_FFFF


def test_hypercall_with_encrypted_bit_is_unshare() -> None:
    request = decode_map_gpa_range([0x20_0000, 512, 1 << 4, 0, 0, 0], vcpu=1)

    assert request == ConversionRequest(Kind.UNSHARE, 0x20_0000, 512, 1, "hypercall", 0)


@pytest.mark.parametrize("page_size", [0, 1, 2])
def test_hypercall_page_size_is_no_private_bit(page_size: int) -> None:
    request = decode_map_gpa_range([0x20_0000, 512, page_size], vcpu=0)

    assert request == ConversionRequest(Kind.SHARE, 0x20_0000, 512, 0, "hypercall", 0)


@pytest.mark.parametrize(
    ("attributes", "reserved"),
    [(1 << 5, 1 << 5), (1 << 63 | 1 << 4, 1 << 63), (3, 3), (15, 15), (1 << 4 | 7, 7)],
)
def test_hypercall_reserved_bits_are_handed_on(attributes: int, reserved: int) -> None:
    assert decode_map_gpa_range([0, 1, attributes], vcpu=0).reserved == reserved


def test_hypercall_hostile_numbers_pass_through_unchanged() -> None:
    request = decode_map_gpa_range([2**64 - 1, 2**64 - 1, 0], vcpu=0)

    assert (request.gpa, request.pages) == (2**64 - 1, 2**64 - 1)


@pytest.mark.parametrize(("command", "kind"), [(1, Kind.SHARE), (2, Kind.UNSHARE)])
def test_port_conversion_command_makes_a_request(command: int, kind: Kind) -> None:
    request = ring(PortDoorbell(1), command, 0x200, 3)

    assert request == ConversionRequest(kind, 0x20_0000, 3, 0, "port")


def test_port_largest_numbers_do_not_wrap() -> None:
    request = ring(PortDoorbell(1), 1, 0xFFFF_FFFF, 0xFFFF_FFFF)

    assert request == ConversionRequest(Kind.SHARE, 0xFFFF_FFFF << 12, 0xFFFF_FFFF, 0, "port")


def test_port_host_check_counts_bytes() -> None:
    assert ring(PortDoorbell(1), 3, 0x300, 2) == HostCheck(0x30_0000, 0x2000, 0)


def test_port_answer_is_read_back_as_twos_complement() -> None:
    doorbell = PortDoorbell(1)
    ring(doorbell, 1, 0, 1)

    doorbell.answer(0, -errno.EINVAL)
    assert doorbell.read(0, 0x0C, 4) == u32(-errno.EINVAL)

    doorbell.answer(0, 0)
    assert doorbell.read(0, 0x0C, 4) == 0


def test_port_unanswered_command_does_not_read_as_success() -> None:
    doorbell = PortDoorbell(1)
    ring(doorbell, 1, 0, 1)

    assert doorbell.read(0, 0x0C, 4) == u32(-errno.EIO)


@pytest.mark.parametrize("command", [0, 4, 0xFFFF_FFFF])
def test_port_unknown_command_answers_enosys(command: int) -> None:
    doorbell = PortDoorbell(1)

    assert ring(doorbell, command, 1, 1) is None
    assert doorbell.read(0, 0x0C, 4) == u32(-errno.ENOSYS)


def test_port_registers_read_back() -> None:
    doorbell = PortDoorbell(1)
    ring(doorbell, 0, 0x1234, 7)

    assert doorbell.read(0, 0x00, 4) == 0x1234
    assert doorbell.read(0, 0x04, 4) == 7
    assert doorbell.read(0, 0x08, 4) == 0x424D4D56


def test_port_latches_of_two_vcpus_are_apart() -> None:
    doorbell = PortDoorbell(2)
    doorbell.write(0, 0x00, 4, 0x111)
    doorbell.write(1, 0x00, 4, 0x222)
    doorbell.write(0, 0x04, 4, 1)
    doorbell.write(1, 0x04, 4, 2)

    first, second = doorbell.write(0, 8, 4, 1), doorbell.write(1, 8, 4, 2)
    doorbell.answer(0, 0)

    assert first == ConversionRequest(Kind.SHARE, 0x111000, 1, 0, "port")
    assert second == ConversionRequest(Kind.UNSHARE, 0x222000, 2, 1, "port")
    assert doorbell.read(1, 0x0C, 4) == u32(-errno.EIO)


def test_port_failure_register_reports_nonzero_codes_only() -> None:
    doorbell = PortDoorbell(1)

    assert doorbell.write(0, 0x10, 4, 77) == Failure(77, 0)
    assert doorbell.write(0, 0x10, 4, 0) is None


def test_port_without_conversions_takes_only_failures() -> None:
    doorbell = PortDoorbell(1, conversions=False)

    assert ring(doorbell, 1, 1, 1) is None
    assert doorbell.read(0, 0x08, 4) == 0xFFFF_FFFF
    assert doorbell.write(0, 0x10, 4, 5) == Failure(5, 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 0x1F),
            st.sampled_from([1, 2, 4]),
            st.integers(0, 2**32 - 1),
        ),
        max_size=20,
    )
)
def test_port_hostile_accesses_answer_in_range(
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    doorbell = PortDoorbell(1)
    for is_write, offset, size, value in accesses:
        if is_write:
            doorbell.write(0, offset, size, value & ((1 << 8 * size) - 1))
        else:
            assert 0 <= doorbell.read(0, offset, size) < 1 << 8 * size
