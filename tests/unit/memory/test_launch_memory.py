"""LaunchMemory: a loader fills the side that the guest will see, until the guest runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.memory import (
    HOLE_END,
    HOLE_START,
    SPLIT_RAM,
    data_pages,
    guest_memory,
    page,
    pages,
    pattern,
)
from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, LaunchMemory

Fill = Callable[[LaunchMemory, bytes, int], object]


def by_pwrite(launch: LaunchMemory, data: bytes, gpa: int) -> None:
    launch.pwrite(data, gpa)


def by_transfer(launch: LaunchMemory, data: bytes, gpa: int) -> int:
    fd = os.memfd_create("image")
    try:
        os.pwrite(fd, data, 10)
        return launch.transfer_in(fd, 10, gpa, len(data))
    finally:
        os.close(fd)


PRIVATE_PAGES = {*range(4, 8), *range(16, 32)}

both_ways = pytest.mark.parametrize("fill", [by_pwrite, by_transfer])


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Pages 4..7 and 16..31 of 64 are private."""
    with guest_memory(pages(4, 4), pages(16, 16)) as made:
        yield made


def sides(memory: GuestMemory) -> tuple[MemfdBacking, MemfdBacking]:
    assert isinstance(memory.shared, MemfdBacking)
    assert isinstance(memory.private, MemfdBacking)
    return memory.shared, memory.private


@both_ways
@pytest.mark.parametrize(
    ("first", "count", "shared_pages", "private_pages"),
    [
        (0, 4, {0, 1, 2, 3}, set()),
        (4, 4, set(), {4, 5, 6, 7}),
        (2, 4, {2, 3}, {4, 5}),
        (6, 4, {8, 9}, {6, 7}),
        (0, 64, {*range(64)} - PRIVATE_PAGES, PRIVATE_PAGES),
    ],
)  # fmt: skip
def test_image_across_private_and_shared_runs_lands_on_the_side_that_the_guest_sees(
    memory: GuestMemory,
    fill: Fill,
    first: int,
    count: int,
    shared_pages: set[int],
    private_pages: set[int],
) -> None:
    data = pattern(page(count))

    fill(LaunchMemory(memory), data, page(first))

    shared, private = sides(memory)
    assert data_pages(shared.fd) == shared_pages
    assert data_pages(private.fd) == private_pages
    seen = b"".join(
        (private if number in private_pages else shared).pread(PAGE_SIZE, page(number))
        for number in range(first, first + count)
    )
    assert seen == data


@both_ways
def test_image_that_starts_and_ends_inside_pages_is_cut_at_page_states_only(
    memory: GuestMemory, fill: Fill
) -> None:
    data = pattern(page(5))

    fill(LaunchMemory(memory), data, page(3) + 100)

    shared, private = sides(memory)
    assert shared.pread(PAGE_SIZE - 100, page(3) + 100) == data[: PAGE_SIZE - 100]
    assert private.pread(page(4), page(4)) == data[PAGE_SIZE - 100 : page(5) - 100]
    assert shared.pread(100, page(8)) == data[-100:]


def test_transfer_of_a_short_file_stops_at_its_end(memory: GuestMemory) -> None:
    fd = os.memfd_create("image")
    os.pwrite(fd, pattern(page(2) + 5), 0)

    moved = LaunchMemory(memory).transfer_in(fd, 0, page(3), page(20))

    os.close(fd)
    assert moved == page(2) + 5
    shared, private = sides(memory)
    assert data_pages(shared.fd) == {3}
    assert data_pages(private.fd) == {4, 5}


@both_ways
@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (HOLE_START - PAGE_SIZE, 2 * PAGE_SIZE),
        (HOLE_START, 1),
        (HOLE_END - 1, 2),
        (HOLE_END + 64 * PAGE_SIZE - 1, 2),
        (-PAGE_SIZE, 2 * PAGE_SIZE),
        (1 << 64, 1),
    ],
)
def test_image_that_does_not_fit_is_refused_before_a_byte_moves(
    fill: Fill, gpa: int, size: int
) -> None:
    with guest_memory(SPLIT_RAM[1], ram=SPLIT_RAM) as memory:
        with pytest.raises(UnmappedAccess, match="--mem"):
            fill(LaunchMemory(memory), bytes(size), gpa)

        assert memory.residency().shared_bytes == memory.residency().private_bytes == 0


@both_ways
@pytest.mark.parametrize("number", [0, 4])
def test_write_after_the_seal_is_refused(memory: GuestMemory, fill: Fill, number: int) -> None:
    launch = LaunchMemory(memory)
    launch.pwrite(b"x", page(number))

    launch.seal()

    with pytest.raises(PrivateAccess, match="after the guest's launch"):
        fill(launch, b"y", page(number))
    shared, private = sides(memory)
    assert (private if number == 4 else shared).pread(1, page(number)) == b"x"


@both_ways
def test_write_of_nothing_is_fine_anywhere_in_ram(memory: GuestMemory, fill: Fill) -> None:
    fill(LaunchMemory(memory), b"", page(4))

    assert memory.residency().private_bytes == 0


def test_written_ranges_are_what_was_filled_in_order(memory: GuestMemory) -> None:
    launch = LaunchMemory(memory)

    launch.pwrite(bytes(10), page(3) + 5)
    by_transfer(launch, bytes(page(2)), page(1))
    launch.pwrite(b"", page(9))
    with pytest.raises(UnmappedAccess):
        launch.pwrite(b"x", page(64))

    assert launch.written == [Range(page(3) + 5, 10), pages(1, 2)]


def test_ordinary_vm_has_everything_on_the_shared_side() -> None:
    memory = GuestMemory([pages(0, 16)], MemfdBacking(page(16)))

    LaunchMemory(memory).pwrite(pattern(page(16)), 0)

    assert memory.pread(page(16), 0) == pattern(page(16))
    memory.close()


@both_ways
def test_common_memory_is_filled_once_on_the_shared_side(fill: Fill) -> None:
    data = pattern(4 * PAGE_SIZE)
    with guest_memory(pages(0, 64), common=pages(5, 2)) as memory:
        shared, private = sides(memory)

        fill(LaunchMemory(memory), data, page(4))

        assert data_pages(shared.fd) == {5, 6}
        assert data_pages(private.fd) == {4, 7}
        assert private.pread(PAGE_SIZE, page(4)) == data[:PAGE_SIZE]
        assert shared.pread(2 * PAGE_SIZE, page(5)) == data[PAGE_SIZE : 3 * PAGE_SIZE]
        assert private.pread(PAGE_SIZE, page(7)) == data[3 * PAGE_SIZE :]


def test_host_access_to_a_private_page_of_common_memory_is_refused() -> None:
    with guest_memory(pages(0, 64), common=pages(0, 6)) as memory, pytest.raises(PrivateAccess):
        memory.pread(1, page(5))
