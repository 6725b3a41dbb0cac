"""Backings over memfds: every verb moves everything, holes read as zeros, residency is true.

MappedGuestMemfdBacking is tried over a memfd too: its way through /proc/self/mem is the same for
any mapping, and tests/kvm has the real thing.
"""

from __future__ import annotations

import errno
import fcntl
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from kvm_bindings import fdops
from tests.support.memory import pattern
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.backing import Backing, Buffer
from vmm.memory.backings.guest_memfd import GuestMemfdBacking, MappedGuestMemfdBacking
from vmm.memory.backings.hugetlb_memfd import HUGE_PAGE, HugetlbMemfdBacking
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.backings.sealed_memfd import SealedMemfdBacking

SIZE = 64 * PAGE_SIZE


def mapped_memfd(size: int) -> MappedGuestMemfdBacking:
    fd = os.memfd_create("stands in for a guest_memfd")
    os.truncate(fd, size)
    return MappedGuestMemfdBacking(fd, size)


@pytest.fixture(params=[MemfdBacking, mapped_memfd])
def backing(request: pytest.FixtureRequest) -> Iterator[Backing]:
    made: Backing = request.param(SIZE)
    yield made
    made.close()


@pytest.fixture
def source() -> Iterator[int]:
    fd = os.memfd_create("source")
    os.pwrite(fd, pattern(40 * PAGE_SIZE), 0)
    yield fd
    os.close(fd)


def test_pwrite_then_pread_moves_the_bytes_across_pages(backing: Backing) -> None:
    data = pattern(3 * PAGE_SIZE)

    backing.pwrite(data, 1000)

    assert backing.pread(len(data) + 2, 999) == b"\0" + data + b"\0"


def test_vectors_move_buffer_after_buffer(backing: Backing) -> None:
    pieces: list[Buffer] = [b"a" * 5000, b"", bytearray(b"b" * 7), memoryview(b"c" * 4096)]
    backing.pwritev(pieces, 100)
    into: list[bytearray | memoryview] = [
        bytearray(6000),
        bytearray(0),
        memoryview(bytearray(3103)),
    ]

    backing.preadv(into, 100)

    assert b"".join(into) == b"".join(pieces)


def test_empty_vector_moves_nothing(backing: Backing) -> None:
    backing.preadv([], 0)
    backing.pwritev([], 0)

    assert backing.resident_bytes() == 0


def test_vector_longer_than_the_kernel_takes_moves_everything(backing: Backing) -> None:
    """IOV_MAX is 1024; a caller of GuestMemory need not know."""
    pieces = [bytes((1 + index % 255,)) for index in range(2500)]
    backing.pwritev(pieces, 10)
    into = [bytearray(1) for _ in pieces]

    backing.preadv(into, 10)

    assert into == pieces


def test_buffers_of_larger_items_move_all_their_bytes(backing: Backing) -> None:
    words = array("Q", range(1, 601))
    backing.pwritev([memoryview(words)], 8)
    into = array("Q", bytes(8 * 600))

    backing.preadv([memoryview(into)], 8)

    assert into == words


def test_transfer_in_moves_a_file_range(backing: Backing, source: int) -> None:
    moved = backing.transfer_in(source, 10, 5000, 20 * PAGE_SIZE)

    assert moved == 20 * PAGE_SIZE
    assert backing.pread(moved, 5000) == pattern(40 * PAGE_SIZE)[10 : 10 + moved]


def test_transfer_in_is_short_at_the_files_end(backing: Backing, source: int) -> None:
    moved = backing.transfer_in(source, 39 * PAGE_SIZE, 0, 5 * PAGE_SIZE)

    assert moved == PAGE_SIZE
    assert backing.pread(2 * PAGE_SIZE, 0)[PAGE_SIZE:] == bytes(PAGE_SIZE)


def test_transfer_out_moves_to_the_files_offset(backing: Backing, source: int) -> None:
    backing.pwrite(pattern(30 * PAGE_SIZE, seed=9), 77)

    moved = backing.transfer_out(77, 30 * PAGE_SIZE, source, 333)

    assert moved == 30 * PAGE_SIZE
    assert os.pread(source, moved, 333) == pattern(30 * PAGE_SIZE, seed=9)


def test_punch_makes_pages_zero_and_gives_them_back(backing: Backing) -> None:
    backing.pwrite(pattern(SIZE), 0)
    assert backing.resident_bytes() == SIZE

    backing.punch(4 * PAGE_SIZE, 8 * PAGE_SIZE)

    assert backing.resident_bytes() == SIZE - 8 * PAGE_SIZE
    assert backing.pread(8 * PAGE_SIZE, 4 * PAGE_SIZE) == bytes(8 * PAGE_SIZE)
    assert backing.pread(1, 12 * PAGE_SIZE) == pattern(SIZE)[12 * PAGE_SIZE :][:1]


def test_residency_agrees_with_the_kernels_other_count(backing: Backing) -> None:
    for number in (0, 5, 6, 63):
        backing.pwrite(b"x", number * PAGE_SIZE)

    assert backing.resident_bytes() == 4 * PAGE_SIZE
    assert os.fstat(backing.fd).st_blocks * 512 == 4 * PAGE_SIZE
    assert fdops.cached_pages(backing.fd) == 4


def test_read_past_the_end_is_an_error_not_a_short_answer(backing: Backing) -> None:
    with pytest.raises(OSError, match=r"ends before|outside"):
        backing.pread(2 * PAGE_SIZE, SIZE - PAGE_SIZE)


def test_close_twice_unmaps_and_closes_once() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for made in (MemfdBacking(SIZE), mapped_memfd(SIZE)):
        made.close()
        made.close()

        with open("/proc/self/maps") as maps:
            assert f"{made.hva:x}-" not in maps.read()
    assert set(os.listdir("/proc/self/fd")) == before


def test_memfd_that_cannot_be_mapped_leaks_no_fd() -> None:
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match=r"ENOMEM|EINVAL|EOVERFLOW"):
        MemfdBacking(1 << 62)

    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("fault", ["mapping", "/proc/self/mem"])
def test_guest_memfd_that_cannot_be_taken_over_leaks_no_fd(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.memfd_create("stands in for a guest_memfd")
    os.truncate(fd, SIZE)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        if fault == "mapping":
            patched.setattr(fdops, "map_shared", refuse)
        else:
            patched.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            MappedGuestMemfdBacking(fd, SIZE)

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# What a mapped guest_memfd does differently.


def test_unreachable_guest_memfd_refuses_every_verb_by_name() -> None:
    fd = os.memfd_create("stands in for a guest_memfd")
    os.truncate(fd, SIZE)
    backing = GuestMemfdBacking(fd, SIZE)
    attempts: list[Any] = [
        lambda: backing.pread(1, 0),
        lambda: backing.pwrite(b"x", 0),
        lambda: backing.preadv([bytearray(1)], 0),
        lambda: backing.pwritev([b"x"], 0),
        lambda: backing.transfer_in(fd, 0, 0, 1),
        lambda: backing.transfer_out(0, 1, fd, 0),
    ]

    for attempt in attempts:
        with pytest.raises(PrivateAccess, match="guest_memfd-mmap or memfd"):
            attempt()

    assert (backing.name, backing.access) == ("guest_memfd", "none")
    assert backing.host_access == "kernel-refused"
    backing.close()


@pytest.mark.parametrize("area", [(-1, 10), (SIZE, 1), (SIZE - 1, 2), (1 << 63, 1)])
def test_mapped_backing_refuses_what_lies_outside_its_mapping(area: tuple[int, int]) -> None:
    """An address computed from a bad offset would reach pyvmm's own memory."""
    offset, size = area
    backing = mapped_memfd(SIZE)
    attempts: Sequence[Any] = [
        lambda: backing.pread(size, offset),
        lambda: backing.pwrite(bytes(size), offset),
        lambda: backing.transfer_in(backing.fd, 0, offset, size),
        lambda: backing.transfer_out(offset, size, backing.fd, 0),
    ]

    for attempt in attempts:
        with pytest.raises(OSError, match="outside") as raised:
            attempt()
        assert raised.value.errno == errno.EINVAL

    assert backing.resident_bytes() == 0
    backing.close()


def test_mapped_backing_whose_pages_cannot_be_reached_is_an_error_not_a_signal() -> None:
    """Pages past a truncated file's end are a SIGBUS for whoever dereferences the mapping."""
    backing = mapped_memfd(SIZE)
    os.truncate(backing.fd, 0)

    with pytest.raises(OSError, match=r"Input/output error|Bad address"):
        backing.pread(16, 0)
    with pytest.raises(OSError, match=r"Input/output error|Bad address"):
        backing.pwrite(b"x", 0)

    backing.close()


# Variants of the memfd, and what backings claim.


def test_sealed_memfd_keeps_its_size_and_still_takes_holes() -> None:
    backing = SealedMemfdBacking(SIZE)
    backing.pwrite(pattern(SIZE), 0)

    for size in (0, SIZE + PAGE_SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(backing.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(backing.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    backing.punch(0, SIZE)

    assert backing.pread(SIZE, 0) == bytes(SIZE)
    assert backing.resident_bytes() == 0
    backing.close()


@pytest.fixture
def huge() -> Iterator[HugetlbMemfdBacking]:
    try:
        made = HugetlbMemfdBacking(2 * HUGE_PAGE)
    except OSError as error:
        pytest.skip(f"{error.strerror}")
    yield made
    made.close()


def test_huge_pages_that_are_not_there_are_named_with_the_remedy() -> None:
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match=r"no 4194304 huge pages to spare; reserve them in /sys/"):
        HugetlbMemfdBacking(1 << 43)

    assert set(os.listdir("/proc/self/fd")) == before


def test_hole_in_a_part_of_a_huge_page_leaves_zeros_and_the_page(huge: HugetlbMemfdBacking) -> None:
    huge.pwrite(pattern(HUGE_PAGE), 0)

    huge.punch(PAGE_SIZE, PAGE_SIZE)

    assert huge.pread(PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert huge.pread(PAGE_SIZE, 0) == pattern(PAGE_SIZE)
    assert huge.resident_bytes() == HUGE_PAGE
    huge.punch(0, HUGE_PAGE)
    assert huge.resident_bytes() == 0


def allowed(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("make", [MemfdBacking, SealedMemfdBacking, HugetlbMemfdBacking])
def test_traits_of_memfds_are_what_the_kernel_does(make: Callable[[int], Backing]) -> None:
    try:
        backing = make(2 * HUGE_PAGE)
    except OSError as error:
        pytest.skip(f"{error.strerror}")
    fd, traits = backing.fd, backing.traits
    reading, writing = os.pipe()

    assert allowed(lambda: os.pread(fd, 16, 0)) == traits.pread
    assert allowed(lambda: os.pwrite(fd, b"x", 0)) == traits.pwrite
    assert allowed(lambda: os.splice(fd, writing, 4096, offset_src=0)) == traits.splice
    assert allowed(lambda: fdops.unmap(fdops.map_shared(fd, HUGE_PAGE), HUGE_PAGE)) == traits.mmap
    backing.pwrite(b"x" * HUGE_PAGE, 0)
    backing.punch(0, traits.granule)
    assert backing.pread(traits.granule, 0) == bytes(traits.granule)
    assert backing.resident_bytes() == HUGE_PAGE - traits.granule
    os.close(reading)
    os.close(writing)
    backing.close()
