"""Memory whose shared pages have an address bit: what a device's addresses mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.memory import SPLIT_RAM, page, pages, pattern
from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.aliased_memory import AliasedMemory, without_bit
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.engines import make_engine
from vmm.memory.guest_memory import LaunchMemory, MemoryThrough, PageState

BIT = 1 << 39
SHARED = page(8)


@pytest.fixture
def memory() -> Iterator[AliasedMemory]:
    """RAM on both sides of a hole; private, but for pages 8 to 15."""
    size = SPLIT_RAM[-1].end
    private = [Range(0, page(8)), Range(page(16), SPLIT_RAM[0].end - page(16)), SPLIT_RAM[1]]
    made = AliasedMemory(SPLIT_RAM, MemfdBacking(size), MemfdBacking(size), private, shared_bit=BIT)
    yield made
    made.close()


Access = Callable[[AliasedMemory, int], object]
ACCESSES: list[Access] = [
    lambda memory, gpa: memory.pread(4, gpa),
    lambda memory, gpa: memory.pwrite(b"1234", gpa),
    lambda memory, gpa: memory.preadv([bytearray(1), bytearray(3)], gpa),
    lambda memory, gpa: memory.pwritev([b"12", b"34"], gpa),
    lambda memory, gpa: memory.read_many([SHARED | BIT, 1, gpa, 4]),
    lambda memory, gpa: memory.write_many([SHARED | BIT, 1, gpa, 4], b"x1234"),
    lambda memory, gpa: memory.transfer_in(_null(), 0, gpa, 4),
    lambda memory, gpa: memory.transfer_out(gpa, 4, _null(), 0),
    lambda memory, gpa: _through(memory).move_in(_null(), [0, SHARED | BIT, 1, 0, gpa, 4]),
    lambda memory, gpa: _through(memory).move_out([SHARED | BIT, 0, 1, gpa, 0, 4], _null()),
    lambda memory, gpa: _through(memory).transfer_in(_null(), 0, gpa, 4),
    lambda memory, gpa: _through(memory).transfer_out(gpa, 4, _null(), 0),
]
_FILE: list[int] = []


def _null() -> int:
    if not _FILE:
        _FILE.append(os.memfd_create("file"))
        os.pwrite(_FILE[0], pattern(PAGE_SIZE), 0)
    return _FILE[0]


def _through(memory: AliasedMemory) -> MemoryThrough:
    return memory.through(make_engine("auto", memory.shared))


def test_address_with_the_bit_is_the_shared_page(memory: AliasedMemory) -> None:
    memory.pwrite(pattern(page(2)), SHARED | BIT)
    memory.write_many([SHARED | BIT, 2, page(15) | BIT, 1], b"abc")
    buffers = [bytearray(2), bytearray(3)]
    memory.preadv(buffers, SHARED | BIT)
    moved = _through(memory).move_in(_null(), [9, page(12) | BIT, 100])

    assert memory.shared.pread(page(2), SHARED) == b"ab" + pattern(page(2))[2:]
    assert bytes(buffers[0]) == b"ab"
    assert memory.read_many([page(15) | BIT, 1, SHARED | BIT, 2]) == b"cab"
    assert (moved, memory.shared.pread(100, page(12))) == (100, pattern(PAGE_SIZE)[9:109])


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("gpa", [0, page(7), SHARED, page(15), SPLIT_RAM[1].start])
def test_address_without_the_bit_is_a_private_page(
    memory: AliasedMemory, access: Access, gpa: int
) -> None:
    with pytest.raises(PrivateAccess, match="without bit 0x8000000000 it names a private page"):
        access(memory, gpa)


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("gpa", [0, page(7), page(16), page(16) - 1, SPLIT_RAM[1].start])
def test_shared_address_of_a_page_that_is_not_shared_is_refused(
    memory: AliasedMemory, access: Access, gpa: int
) -> None:
    with pytest.raises(PrivateAccess, match="is private"):
        access(memory, gpa | BIT)


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize(
    "gpa",
    [
        -1,
        -BIT,
        BIT - 1,
        SPLIT_RAM[0].end,
        SPLIT_RAM[0].end | BIT,
        SPLIT_RAM[1].end | BIT,
        SPLIT_RAM[1].end,
        2 * BIT,
        2 * BIT | BIT | SHARED,
        1 << 63,
        (1 << 64) - 1,
    ],
)
def test_hostile_address_outside_ram_is_unmapped(
    memory: AliasedMemory, access: Access, gpa: int
) -> None:
    with pytest.raises(UnmappedAccess):
        access(memory, gpa)


def test_states_conversions_and_loading_know_plain_addresses(memory: AliasedMemory) -> None:
    launch = LaunchMemory(memory)

    launch.pwrite(pattern(page(2)), page(7))
    memory.begin_conversion(pages(7, 1))
    memory.finish_conversion(PageState.SHARED)

    assert memory.states(pages(0, 17)) == [
        (pages(0, 7), PageState.PRIVATE),
        (pages(7, 9), PageState.SHARED),
        (pages(16, 1), PageState.PRIVATE),
    ]
    assert memory.private is not None
    assert memory.private.pread(PAGE_SIZE, page(7)) == pattern(PAGE_SIZE)
    assert memory.pread(PAGE_SIZE, SHARED | BIT) == pattern(page(2))[PAGE_SIZE:]


def test_balloon_gives_pages_back_by_their_number(memory: AliasedMemory) -> None:
    memory.pwrite(b"x", SHARED | BIT)
    assert memory.private is not None
    memory.private.pwrite(b"y", 0)

    memory.discard(SHARED, PAGE_SIZE)
    memory.discard(0 | BIT, PAGE_SIZE)

    assert memory.residency() == (0, 0)
    with pytest.raises(UnmappedAccess):
        memory.discard(-PAGE_SIZE, PAGE_SIZE)


def test_policies_hear_of_plain_addresses() -> None:
    heard: list[tuple[Range, bool, str | None]] = []

    without_bit(lambda *event: heard.append(event), BIT)(Range(SHARED | BIT, 5), True, "ring")

    assert heard == [(Range(SHARED, 5), True, "ring")]


@pytest.mark.parametrize("bit", [0, 3 << 39, SPLIT_RAM[-1].end - 1, 1 << 31])
def test_bit_that_is_none_or_inside_ram_is_refused(bit: int) -> None:
    with pytest.raises(ValueError, match="no single bit above RAM"):
        AliasedMemory(SPLIT_RAM, MemfdBacking(PAGE_SIZE), shared_bit=bit)
