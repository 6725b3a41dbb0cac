"""The hypercall: what it decodes to."""

from __future__ import annotations

import pytest

from vmm.arch.x86_64.doorbells import decode_map_gpa_range
from vmm.core.events import ConversionRequest, Kind


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
