"""Requests as a hostile guest makes them: each refused with its errno, nothing changed."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.conversion import Answering, RecordingScheme, snapshot, tally
from tests.support.memory import HOLE_END, HOLE_START, SPLIT_RAM, guest_memory, page, pages
from vmm.arch.x86_64.doorbells import decode_map_gpa_range
from vmm.conversion.schemes.plain import PlainScheme
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Allow, Policy

ENCRYPTED = 1 << 4
SIZE_2M, SIZE_1G = 1, 2
HOLE_PAGE, TOP_PAGE = HOLE_START // PAGE_SIZE, SPLIT_RAM[1].end // PAGE_SIZE


@pytest.fixture
def split() -> Iterator[GuestMemory]:
    """RAM on both sides of the hole; the first MiB below it and all above it private."""
    below = Range(HOLE_START - page(256), page(256))
    with guest_memory(below, SPLIT_RAM[1], ram=SPLIT_RAM) as memory:
        yield memory


BAD = {
    "unaligned by one": (0x1001, 1),
    "unaligned by half a page": (0x1800, 1),
    "unaligned above 64 bits' middle": ((1 << 63) + 1, 1),
    "no pages": (0x1000, 0),
    "no pages beyond RAM": (page(TOP_PAGE), 0),
    "negative pages": (0x10_0000, -1),
    "negative pages that would end in RAM": (0x10_0000, -256),
    "negative address": (-0x1000, 1),
    "negative address that would end in RAM": (-0x1000, 2),
    "bytes just past 64 bits": (0, 1 << 52),
    "bytes that wrap to one page": (0, (1 << 52) + 1),
    "most pages": (0, (1 << 64) - 1),
    "end that wraps to zero": ((1 << 64) - 0x1000, 1),
    "end that wraps into RAM": ((1 << 64) - 0x1000, 0x11),
    "address with the C-bit": (1 << 38 | 0x1000, 1),
    "in the hole": (HOLE_START, 1),
    "whole hole": (HOLE_START, HOLE_PAGE // 3),
    "into the hole": (HOLE_START - 0x1000, 2),
    "out of the hole": (HOLE_END - 0x1000, 2),
    "straddling the hole": (HOLE_START - 0x1000, (HOLE_END - HOLE_START) // PAGE_SIZE + 2),
    "everything": (0, TOP_PAGE),
    "just beyond RAM": (page(TOP_PAGE), 1),
    "last page and one more": (page(TOP_PAGE - 1), 2),
    "far beyond RAM": (1 << 51, 1),
}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("gpa", "count"), BAD.values(), ids=BAD)
def test_bad_range_is_einval_before_anybody_is_asked(
    split: GuestMemory, kind: Kind, gpa: int, count: int
) -> None:
    policy, scheme = Answering(Allow()), RecordingScheme(split)
    converter = Converter(split, scheme, policy)
    states = split.states()

    answer = converter.convert(ConversionRequest(kind, gpa, count, 0, "test"))

    assert answer == -errno.EINVAL
    assert split.states() == states
    assert (policy.asked, scheme.calls) == ([], [])
    assert tally(converter, kind) == {"calls": 1, "bytes": 0, "denied": 0, "failed": 1}


@pytest.mark.parametrize(
    ("attributes", "expected", "state"),
    [
        (0, 0, PageState.SHARED),
        (SIZE_2M, 0, PageState.SHARED),  # the page-size code's low bit is not the private bit
        (SIZE_1G, 0, PageState.SHARED),
        (ENCRYPTED, 0, PageState.PRIVATE),
        (ENCRYPTED | SIZE_2M, 0, PageState.PRIVATE),
        (3, -errno.EINVAL, None),
        (15, -errno.EINVAL, None),
        (1 << 5, -errno.EINVAL, None),
        (1 << 3, -errno.EINVAL, None),  # KVM's own private bit, which is not the hypercall's
        (ENCRYPTED | 1 << 63, -errno.EINVAL, None),
        ((1 << 64) - 1, -errno.EINVAL, None),
    ],
)
@pytest.mark.parametrize("start", [PageState.SHARED, PageState.PRIVATE])
def test_hypercall_attributes_mean_what_the_abi_says(
    attributes: int, expected: int, state: PageState | None, start: PageState
) -> None:
    with guest_memory(*([pages(0, 64)] if start is PageState.PRIVATE else [])) as memory:
        scheme = RecordingScheme(memory)
        converter = Converter(memory, scheme, Policy())
        before = snapshot(memory, scheme)

        answer = converter.convert(decode_map_gpa_range((page(8), 16, attributes), vcpu=0))

        assert answer == expected
        if state is None:
            assert snapshot(memory, scheme) == before
        else:
            assert memory.states(pages(8, 16)) == [(pages(8, 16), state)]
            rest = [memory.states(pages(0, 8)), memory.states(pages(24, 40))]
            assert rest == [[(pages(0, 8), start)], [(pages(24, 40), start)]]


def test_page_count_is_in_4_kib_pages_whatever_the_size_code_says() -> None:
    with guest_memory(pages(0, 64)) as memory:
        converter = Converter(memory, RecordingScheme(memory), Policy())

        converter.convert(decode_map_gpa_range((page(8), 2, SIZE_2M), vcpu=0))

        assert memory.bytes_in(PageState.SHARED) == page(2)


def test_reserved_bits_are_refused_also_where_the_rest_is_good(split: GuestMemory) -> None:
    converter = Converter(split, RecordingScheme(split), Policy())

    answer = converter.convert(ConversionRequest(Kind.UNSHARE, 0, 1, 0, "test", reserved=1 << 5))

    assert answer == -errno.EINVAL


def test_ordinary_vm_answers_that_it_has_no_private_memory() -> None:
    memory = GuestMemory([pages(0, 4)], MemfdBacking(page(4)))
    converter = Converter(memory, PlainScheme(), Policy())

    answer = converter.convert(ConversionRequest(Kind.UNSHARE, 0, 1, 0, "test"))

    assert answer == -errno.EOPNOTSUPP
    assert memory.states() == [(pages(0, 4), PageState.SHARED)]
    memory.close()


REGISTERS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 80).map(page),
    st.sampled_from([0, 1, 15, 16, 17, 64, 1 << 52, (1 << 52) + 1, (1 << 64) - 1]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(REGISTERS, REGISTERS, REGISTERS), min_size=1, max_size=5))
def test_any_hypercalls_leave_the_books_balanced(calls: list[tuple[int, int, int]]) -> None:
    with guest_memory(pages(32, 32)) as memory:
        converter = Converter(memory, RecordingScheme(memory), Policy())

        answers = [converter.convert(decode_map_gpa_range(call, vcpu=0)) for call in calls]

        share, unshare = converter.accounting.share, converter.accounting.unshare
        assert set(answers) <= {0, -errno.EINVAL}
        assert share.calls + unshare.calls == len(calls)
        assert share.failed + unshare.failed == len([a for a in answers if a])
        assert memory.bytes_in(PageState.CONVERTING) == 0
        assert memory.bytes_in(PageState.SHARED) == page(32) + share.bytes - unshare.bytes
