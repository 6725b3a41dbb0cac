"""GuestMemory: an access is carried out whole, or refused before a byte moves."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Iterator

import pytest

from kvm_bindings import KvmError
from tests.support.memory import (
    HOLE_END,
    HOLE_START,
    SMALL_RAM,
    SPLIT_RAM,
    data_pages,
    guest_memory,
    page,
    pages,
    pattern,
)
from vmm.core.errors import GuestMemoryError, PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState, Residency

Verb = Callable[[GuestMemory, int, int, int], object]
"""(memory, gpa, size, an fd at whose offset 0 there are 1 MiB of pattern)"""

VERBS: dict[str, Verb] = {
    "pread": lambda memory, gpa, size, fd: memory.pread(size, gpa),
    "pwrite": lambda memory, gpa, size, fd: memory.pwrite(pattern(size), gpa),
    "preadv": lambda memory, gpa, size, fd: memory.preadv(
        [bytearray(size // 3), bytearray(size - size // 3)], gpa
    ),
    "pwritev": lambda memory, gpa, size, fd: memory.pwritev(
        [pattern(size)[: size // 3], pattern(size)[size // 3 :]], gpa
    ),
    "transfer_in": lambda memory, gpa, size, fd: memory.transfer_in(fd, 0, gpa, size),
    "transfer_out": lambda memory, gpa, size, fd: memory.transfer_out(gpa, size, fd, 0),
}
WRITERS = {"pwrite", "pwritev", "transfer_in"}

every_verb = pytest.mark.parametrize("name", VERBS)


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("file")
    os.pwrite(fd, pattern(1 << 20), 0)
    yield fd
    os.close(fd)


@pytest.fixture
def split() -> Iterator[GuestMemory]:
    """3 GiB below the hole, 64 pages above it, all shared."""
    with guest_memory(ram=SPLIT_RAM) as memory:
        yield memory


@pytest.fixture
def mixed() -> Iterator[GuestMemory]:
    """64 pages: 8..15 and 32..63 private, all other shared."""
    with guest_memory(pages(8, 8), pages(32, 32)) as memory:
        yield memory


def content(memory: GuestMemory, file: int) -> tuple[bytes, bytes, set[int], set[int]]:
    """Everything that an access could have changed."""
    assert memory.private is not None
    return (
        memory.shared.pread(64 * PAGE_SIZE, memory.ram[-1].start),
        os.pread(file, 2 << 20, 0),
        data_pages(memory.shared.fd),
        data_pages(memory.private.fd),
    )


# Moving bytes.


@pytest.mark.parametrize(
    "gpa",
    [0, 5, PAGE_SIZE - 1, HOLE_START - 3 * PAGE_SIZE, HOLE_END, HOLE_END + 61 * PAGE_SIZE],
    ids=hex,
)
def test_verbs_reach_ram_on_both_sides_of_the_hole(split: GuestMemory, file: int, gpa: int) -> None:
    data = pattern(3 * PAGE_SIZE, seed=gpa)

    split.pwrite(data, gpa)
    whole = split.pread(len(data), gpa)
    pieces = [bytearray(4096), bytearray(8192)]
    split.preadv(pieces, gpa)
    moved_out = split.transfer_out(gpa, len(data), file, 0)
    split.pwritev([bytes(PAGE_SIZE), b"tail"], gpa)
    after = split.pread(len(data), gpa)
    moved_in = split.transfer_in(file, 0, gpa, len(data))

    assert whole == b"".join(pieces) == data
    assert after == bytes(PAGE_SIZE) + b"tail" + data[PAGE_SIZE + 4 :]
    assert (moved_out, moved_in) == (len(data), len(data))
    assert split.pread(len(data), gpa) == data


def test_transfer_in_is_short_at_the_files_end(mixed: GuestMemory, file: int) -> None:
    assert mixed.transfer_in(file, (1 << 20) - 100, 0, PAGE_SIZE) == 100


@every_verb
@pytest.mark.parametrize("gpa", [0, page(8) - 1, page(16), page(32) - 1])
def test_access_of_no_bytes_on_shared_ram_is_fine(
    mixed: GuestMemory, file: int, name: str, gpa: int
) -> None:
    before = content(mixed, file)

    VERBS[name](mixed, gpa, 0, file)

    assert content(mixed, file) == before


def test_access_that_fails_on_the_way_holds_nothing_off(mixed: GuestMemory) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        mixed.transfer_in(-1, 0, 0, PAGE_SIZE)

    mixed.begin_conversion(pages(0, 1))
    assert mixed.quiesce(pages(0, 1), 0)


# Refusals. `before` and `after` are compared byte for byte.


@every_verb
@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (HOLE_START - 1, 2),
        (HOLE_START, 1),
        (HOLE_START, 0),
        (HOLE_END - 1, 1),
        (HOLE_END - 1, 2),
        (HOLE_END + 64 * PAGE_SIZE, 1),
        (HOLE_END + 64 * PAGE_SIZE, 0),
        (HOLE_END + 64 * PAGE_SIZE - 1, 2),
        (-1, 1),
        (-1, 2),
        (-PAGE_SIZE, 0),
        (1 << 63, 1),
        (1 << 64, 1),
        ((1 << 64) - 1, 2),
    ],
)
def test_access_off_ram_is_refused_before_a_byte_moves(
    split: GuestMemory, file: int, name: str, gpa: int, size: int
) -> None:
    before = content(split, file)

    with pytest.raises(UnmappedAccess, match=f"{gpa:#x}"):
        VERBS[name](split, gpa, size, file)

    assert content(split, file) == before


@pytest.mark.parametrize("name", ["pread", "transfer_in", "transfer_out"])
def test_access_from_ram_across_the_whole_hole_is_refused(
    split: GuestMemory, file: int, name: str
) -> None:
    """Both ends are RAM: a check of the ends alone would let it through."""
    with pytest.raises(UnmappedAccess, match="no guest RAM"):
        VERBS[name](split, HOLE_START - PAGE_SIZE, HOLE_END - HOLE_START + 2 * PAGE_SIZE, file)


@pytest.mark.parametrize("size", [-1, -(1 << 40)])
@pytest.mark.parametrize("name", ["pread", "transfer_in", "transfer_out"])
def test_access_of_a_negative_size_is_refused(
    mixed: GuestMemory, file: int, name: str, size: int
) -> None:
    with pytest.raises(UnmappedAccess):
        VERBS[name](mixed, page(20), size, file)


@every_verb
@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (page(8), 1),
        (page(8), 0),
        (page(16) - 1, 1),
        (page(8) - 1, 2),
        (page(16) - 1, 2),
        (page(4), page(8)),
        (page(12), page(8)),
        (page(7), page(10)),
        (0, page(64)),
        (page(32), page(32)),
    ],
)
def test_access_to_private_or_partly_private_pages_is_refused_before_a_byte_moves(
    mixed: GuestMemory, file: int, name: str, gpa: int, size: int
) -> None:
    before = content(mixed, file)

    with pytest.raises(PrivateAccess, match="is private"):
        VERBS[name](mixed, gpa, size, file)

    assert content(mixed, file) == before


@every_verb
@pytest.mark.parametrize(("gpa", "size"), [(page(2), 1), (page(2) - 1, 2), (0, page(8))])
def test_access_to_converting_pages_is_refused_before_a_byte_moves(
    mixed: GuestMemory, file: int, name: str, gpa: int, size: int
) -> None:
    mixed.begin_conversion(pages(2, 1))
    before = content(mixed, file)

    with pytest.raises(PrivateAccess, match="is converting"):
        VERBS[name](mixed, gpa, size, file)

    assert content(mixed, file) == before


@pytest.mark.parametrize("name", ["pwrite", "pwritev", "preadv"])
def test_buffer_of_larger_items_is_checked_by_its_bytes(mixed: GuestMemory, name: str) -> None:
    """100 words are 800 bytes: the check must not take them for 100."""
    words = memoryview(array("Q", bytes(800)))
    arguments = words if name == "pwrite" else [words]

    with pytest.raises(PrivateAccess):
        getattr(mixed, name)(arguments, page(8) - 200)

    assert data_pages(mixed.shared.fd) == set()


def test_refusals_name_the_access_and_the_pages(mixed: GuestMemory) -> None:
    with pytest.raises(PrivateAccess) as private:
        mixed.pread(0x3000, 0x6000)
    with pytest.raises(UnmappedAccess) as outside:
        mixed.pread(2, 0x3FFFF)

    assert str(private.value) == "host access to 12288 bytes at 0x6000: [0x8000, 0x9000) is private"
    assert str(outside.value) == "host access to 2 bytes at 0x3ffff is outside guest RAM"
    assert issubclass(PrivateAccess, GuestMemoryError)


def test_refusal_at_the_hole_names_the_hole() -> None:
    with guest_memory(ram=SPLIT_RAM) as memory, pytest.raises(UnmappedAccess) as raised:
        memory.pread(2, HOLE_START - 1)

    assert str(raised.value) == (
        "host access to 2 bytes at 0xbfffffff: no guest RAM at [0xc0000000, 0xc0000001)"
    )


# States and residency.


def test_states_leave_out_the_hole_and_bytes_add_up() -> None:
    with guest_memory(pages(1, 3), SPLIT_RAM[1], ram=SPLIT_RAM) as memory:
        states = memory.states()

        assert states == [
            (pages(0, 1), PageState.SHARED),
            (pages(1, 3), PageState.PRIVATE),
            (Range(page(4), HOLE_START - page(4)), PageState.SHARED),
            (SPLIT_RAM[1], PageState.PRIVATE),
        ]
        assert memory.bytes_in(PageState.PRIVATE) == page(3 + 64)
        assert sum(memory.bytes_in(state) for state in PageState) == memory.ram_bytes


@pytest.mark.parametrize(
    ("area", "expected"),
    [
        (SPLIT_RAM[0], True),
        (SPLIT_RAM[1], True),
        (Range(HOLE_START - PAGE_SIZE, PAGE_SIZE), True),
        (Range(HOLE_START - PAGE_SIZE, 2 * PAGE_SIZE), False),
        (Range(HOLE_START, PAGE_SIZE), False),
        (Range(0, SPLIT_RAM[1].end), False),
    ],
)
def test_is_ram_needs_one_range_to_hold_it_all(
    split: GuestMemory, area: Range, expected: bool
) -> None:
    assert split.is_ram(area) == expected


def test_residency_counts_what_the_kernel_holds_for_either_side(mixed: GuestMemory) -> None:
    assert mixed.private is not None
    mixed.pwrite(b"x", page(1))
    mixed.pwrite(pattern(page(3)), page(16))
    mixed.private.pwrite(pattern(page(2)), page(8))

    assert mixed.residency() == Residency(page(2), page(4))
    assert os.fstat(mixed.shared.fd).st_blocks * 512 == page(4)
    assert os.fstat(mixed.private.fd).st_blocks * 512 == page(2)


def test_memory_behind_the_side_that_nobody_uses_is_counted() -> None:
    """A guest that reaches both sides of a page can fill both."""
    with guest_memory(pages(8, 56), common=pages(8, 2)) as memory:
        assert memory.private is not None
        memory.pwrite(pattern(page(3)), 0)
        memory.private.pwrite(pattern(page(2)), page(20))
        assert memory.other_side_bytes() == 0

        memory.shared.pwrite(pattern(page(4)), page(8))  # of these two are common
        memory.private.pwrite(pattern(page(1)), page(1))

        assert memory.other_side_bytes() == page(3)


def test_memory_on_the_other_side_is_unknown_where_the_kernel_does_not_tell(
    mixed: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(offset: int = 0, size: int = 0) -> int:
        raise KvmError("cachestat", errno.ENOSYS)

    monkeypatch.setattr(mixed.private, "resident_bytes", refuse)

    assert mixed.other_side_bytes() is None


def test_ordinary_vm_has_no_other_side() -> None:
    memory = GuestMemory(SMALL_RAM, MemfdBacking(SMALL_RAM[-1].end))

    assert memory.other_side_bytes() == 0
    memory.close()


def test_read_of_untouched_memory_is_zeros_and_takes_no_memory(mixed: GuestMemory) -> None:
    assert mixed.pread(page(8), 0) == bytes(page(8))
    assert mixed.residency() == Residency(0, 0)


def test_ordinary_vm_has_one_backing_and_no_private_bytes() -> None:
    memory = GuestMemory(SMALL_RAM, MemfdBacking(SMALL_RAM[-1].end))
    memory.pwrite(b"x", 0)

    assert memory.residency() == Residency(0, PAGE_SIZE)
    assert memory.bytes_in(PageState.PRIVATE) == 0
    memory.close()


def test_private_ranges_without_a_private_backing_are_refused() -> None:
    shared = MemfdBacking(SMALL_RAM[-1].end)

    with pytest.raises(ValueError, match="private backing"):
        GuestMemory(SMALL_RAM, shared, None, [pages(0, 1)])

    shared.close()


def test_begin_conversion_over_a_hole_changes_nothing(split: GuestMemory) -> None:
    before = split.states()

    with pytest.raises(UnmappedAccess):
        split.begin_conversion(Range(HOLE_START - PAGE_SIZE, 2 * PAGE_SIZE))

    assert split.states() == before


def test_begin_conversion_past_the_end_of_ram_is_refused(mixed: GuestMemory) -> None:
    before = mixed.states()

    for area in (Range(mixed.ram[-1].end, PAGE_SIZE), Range(1 << 44, PAGE_SIZE)):
        with pytest.raises(UnmappedAccess, match="not wholly guest RAM"):
            mixed.begin_conversion(area)

    assert mixed.states() == before


def test_begin_conversion_of_converting_pages_is_a_programming_error(mixed: GuestMemory) -> None:
    mixed.begin_conversion(pages(0, 2))

    with pytest.raises(RuntimeError, match="being converted already"):
        mixed.begin_conversion(pages(1, 2))


def test_abandon_puts_back_exactly_what_was_there(mixed: GuestMemory) -> None:
    before = mixed.states()

    mixed.begin_conversion(pages(4, 40))
    mixed.abandon_conversion()

    assert mixed.states() == before
