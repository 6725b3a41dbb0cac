"""Memory whose host is not told of shares: every verb by copying calls, EFAULT is PrivateAccess.

Private pages are modelled by tests.support.protected.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvm_bindings import KvmError, fdops, mapped
from tests.support.memory import SPLIT_RAM, page, pages, pattern
from tests.support.protected import ProtectedGuest, protected_memory
from vmm.core.errors import PrivateAccess, UnmappedAccess, UsageError
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking
from vmm.memory.engines import make_engine
from vmm.memory.guest_memory import LaunchMemory, PageState
from vmm.memory.observed_memory import Observation, ObservedMemory


@pytest.fixture
def observed() -> Iterator[tuple[ObservedMemory, ProtectedGuest]]:
    """64 pages, launched; the guest keeps all but pages 16 to 31, which it shares."""
    with protected_memory(pages(0, 16), pages(32, 32)) as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    """A file of 64 KiB of pattern."""
    path = tmp_path / "disk"
    path.write_bytes(pattern(1 << 16))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


Pair = tuple[ObservedMemory, ProtectedGuest]
SHARED = page(16)


def test_shared_bytes_are_read_and_written(observed: Pair) -> None:
    memory, guest = observed
    guest.poke(pattern(page(3)), SHARED + 5)

    read = memory.pread(page(3), SHARED + 5)
    memory.pwrite(b"answer", SHARED + page(8) - 3)

    assert read == pattern(page(3))
    assert guest.peek(6, SHARED + page(8) - 3) == b"answer"


def test_vectors_and_many_pieces_are_read_and_written(observed: Pair) -> None:
    memory, guest = observed
    buffers = [bytearray(10), bytearray(page(1))]

    memory.pwritev([b"ab", memoryview(b"cdef")], SHARED)
    memory.preadv(buffers, SHARED)
    memory.write_many([page(20) + 1, 3, page(17), 0, page(18), 2], b"xyzuv")
    many = memory.read_many([page(18), 2, page(20), 5, SHARED, 3])

    assert bytes(buffers[0]) == b"abcdef\0\0\0\0"
    assert many == b"uv\0xyz\0abc"
    assert guest.peek(3, page(20) + 1) == b"xyz"


def test_more_pieces_than_one_system_call_takes_are_all_moved(observed: Pair) -> None:
    memory, guest = observed
    pieces = [number for at in range(3000) for number in (SHARED + 2 * at, 1)]
    data = pattern(3000)

    memory.write_many(pieces, data)

    assert memory.read_many(pieces) == data
    assert guest.peek(6000, SHARED)[::2] == data
    assert guest.peek(6000, SHARED)[1::2] == bytes(3000)


ACCESSES: list[Callable[[ObservedMemory, int], object]] = [
    lambda memory, gpa: memory.pread(2, gpa),
    lambda memory, gpa: memory.pwrite(b"XX", gpa),
    lambda memory, gpa: memory.preadv([bytearray(2)], gpa),
    lambda memory, gpa: memory.pwritev([b"X", b"X"], gpa),
    lambda memory, gpa: memory.read_many([SHARED, 1, gpa, 2]),
    lambda memory, gpa: memory.write_many([SHARED, 1, gpa, 2], b"YXX"),
]


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("gpa", [0, SHARED - 2, page(32), page(63)])
def test_private_page_is_private_access_and_stays_as_it_is(
    observed: Pair, access: Callable[[ObservedMemory, int], object], gpa: int
) -> None:
    memory, guest = observed
    guest.poke(b"ow", gpa)

    with pytest.raises(PrivateAccess, match=r"is private [(]EFAULT[)]"):
        access(memory, gpa)

    assert guest.peek(2, gpa) == b"ow"
    assert memory.quiesce(pages(0, 64), 0.0)


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("gpa", [-1, page(64) - 1, page(64), 1 << 63, (1 << 64) - 1])
def test_access_outside_ram_is_unmapped(
    observed: Pair, access: Callable[[ObservedMemory, int], object], gpa: int
) -> None:
    with pytest.raises(UnmappedAccess):
        access(observed[0], gpa)


def test_hole_in_ram_is_unmapped_on_either_side_and_inside() -> None:
    with protected_memory(ram=SPLIT_RAM) as (memory, _):
        for gpa in (SPLIT_RAM[0].end - 1, SPLIT_RAM[0].end, SPLIT_RAM[1].start - 1):
            with pytest.raises(UnmappedAccess):
                memory.pread(2, gpa)
        assert memory.pread(2, SPLIT_RAM[1].start) == b"\0\0"


@pytest.mark.parametrize("offset", [0, 100, PAGE_SIZE - 1])
def test_access_across_the_boundary_names_the_first_private_byte(
    observed: Pair, offset: int
) -> None:
    memory, guest = observed
    guest.poke(bytes(PAGE_SIZE) + b"own", page(31))

    with pytest.raises(PrivateAccess, match=f"{page(32):#x} is private"):
        memory.pread(2 * PAGE_SIZE - offset, page(31) + offset)
    with pytest.raises(PrivateAccess, match=f"{page(32):#x} is private"):
        memory.pwrite(b"X" * (2 * PAGE_SIZE - offset), page(31) + offset)

    assert guest.peek(PAGE_SIZE, page(31)) == bytes(offset) + b"X" * (PAGE_SIZE - offset)
    assert guest.peek(3, page(32)) == b"own"


def test_page_that_the_guest_shares_and_takes_back_is_found_so(observed: Pair) -> None:
    memory, guest = observed
    guest.poke(b"own", page(40))
    answers = []
    for change in (guest.share, guest.unshare):
        change(pages(40, 1))
        answers += memory.probe([page(39), page(40), page(41)])

    assert answers == [False, True, False, False, False, False]


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "pread"])
def test_disk_bytes_move_by_both_engines(observed: Pair, disk: int, name: str) -> None:
    memory, guest = observed
    engine = make_engine(name, memory.shared)
    seen = memory.through(engine)
    guest.poke(b"guest's", page(30))

    moved_in = seen.move_in(disk, [7, SHARED + 1, page(2), 100, page(20), 50])
    moved_out = seen.move_out([page(30), 4096, 7], disk)
    one = (seen.transfer_in(disk, 0, page(21), 3), seen.transfer_out(page(30), 2, disk, 0))

    assert (moved_in, moved_out, one) == (page(2) + 50, 7, (3, 2))
    assert guest.peek(page(2), SHARED + 1) == pattern(1 << 16)[7 : 7 + page(2)]
    assert guest.peek(50, page(20)) == pattern(1 << 16)[100:150]
    assert os.pread(disk, 7, 4096) == b"guest's"
    assert os.pread(disk, 2, 0) == b"gu"
    assert engine.as_dict()["bytes"] == {"copying system calls": page(2) + 50 + 7 + 5}


@pytest.mark.parametrize("name", ["auto", "pread"])
def test_end_of_the_file_is_a_short_count(observed: Pair, disk: int, name: str) -> None:
    seen = observed[0].through(make_engine(name, observed[0].shared))

    assert seen.transfer_in(disk, (1 << 16) - 10, SHARED, 100) == 10
    assert seen.move_in(disk, [(1 << 16) - 1, SHARED, 2, 0, SHARED, 4]) == 1


@pytest.mark.parametrize("name", ["auto", "pread"])
def test_disk_transfer_to_a_private_page_moves_not_a_byte_of_it(
    observed: Pair, disk: int, name: str
) -> None:
    memory, guest = observed
    seen = memory.through(make_engine(name, memory.shared))
    secret = b"secret" * 700
    guest.poke(secret, page(32))
    before = os.pread(disk, 1 << 16, 0)

    calls: list[Callable[[], int]] = [
        lambda: seen.transfer_in(disk, 0, page(32), 4200),
        lambda: seen.transfer_in(disk, 0, page(31), page(2)),
        lambda: seen.transfer_out(page(32), 4200, disk, 0),
        lambda: seen.move_out([page(31), PAGE_SIZE, page(2)], disk),
    ]
    for call in calls:
        with pytest.raises(PrivateAccess, match="EFAULT"):
            call()

    assert guest.peek(len(secret), page(32)) == secret
    after = os.pread(disk, 1 << 16, 0)
    assert b"secret" not in after
    assert after[:PAGE_SIZE] == before[:PAGE_SIZE]
    assert after[2 * PAGE_SIZE :] == before[2 * PAGE_SIZE :]


@pytest.mark.parametrize("name", ["fd2fd", "mmap"])
def test_engines_that_destroy_protected_pages_are_refused(observed: Pair, name: str) -> None:
    with pytest.raises(UsageError, match=f"io={name}: .*; use io=auto or io=pread"):
        make_engine(name, observed[0].shared)


def _never(*_: object) -> int:
    raise AssertionError("guest memory was the buffer of a read or write that is no copy")


def test_direct_file_goes_through_a_buffer_of_ours(
    observed: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, guest = observed
    path = tmp_path / "direct"
    path.write_bytes(pattern(PAGE_SIZE))
    fd = os.open(path, os.O_RDWR)
    # A file system here may have no O_DIRECT: what counts is that the flag is looked at.
    assert mapped.is_copied(fd)
    monkeypatch.setattr(mapped, "is_copied", lambda fd: False)
    monkeypatch.setattr(mapped, "move_in", _never)
    monkeypatch.setattr(mapped, "move_out", _never)
    seen = memory.through(make_engine("auto", memory.shared))
    guest.poke(b"out", page(20))

    moved = seen.transfer_in(fd, 0, SHARED, PAGE_SIZE), seen.transfer_out(page(20), 3, fd, 0)

    assert moved == (PAGE_SIZE, 3)
    assert guest.peek(PAGE_SIZE, SHARED) == pattern(PAGE_SIZE)
    assert os.pread(fd, 3, 0) == b"out"
    os.close(fd)


def test_only_files_that_are_known_to_copy_count_as_copied(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    opened = [os.open(path, os.O_RDWR), *os.pipe(), os.open("/proc/self/maps", os.O_RDONLY)]
    try:
        opened.append(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        assert error.errno == errno.EINVAL

    found = [mapped.is_copied(fd) for fd in opened]

    assert found[1:] == [False] * (len(opened) - 1)
    memfd = os.memfd_create("copied")
    assert mapped.is_copied(memfd)
    for fd in (memfd, *opened):
        os.close(fd)


# -- the launch -----------------------------------------------------------------------------------


def test_loading_goes_by_the_fd_until_the_launch(disk: int) -> None:
    backing = ProtectedMemfdBacking(page(64))
    memory = ObservedMemory((pages(0, 64),), backing)
    fdops.protect(backing.hva, backing.size, fdops.PROT_NONE)
    launch = LaunchMemory(memory)

    launch.pwrite(b"kernel", page(1))
    moved = launch.transfer_in(disk, 0, page(2), 5000)
    launch.seal()
    both = fdops.PROT_READ | fdops.PROT_WRITE
    fdops.protect(backing.hva, backing.size, both)

    assert moved == 5000
    assert memory.pread(6, page(1)) == b"kernel"
    assert memory.pread(5000, page(2)) == pattern(5000)
    assert launch.written == [Range(page(1), 6), Range(page(2), 5000)]
    with pytest.raises(PrivateAccess, match="after the guest's launch"):
        launch.pwrite(b"late", 0)
    memory.close()


FD_CALLS: dict[str, Callable[[int, int], object]] = {
    "pread": lambda fd, other: os.pread(fd, 1, 0),
    "pwrite": lambda fd, other: os.pwrite(fd, b"x", 0),
    "sendfile": lambda fd, other: os.sendfile(other, fd, 0, 1),
    "copy_file_range": lambda fd, other: os.copy_file_range(fd, other, 1, 0, 0),
    "mmap": lambda fd, other: fdops.map_shared(fd, PAGE_SIZE),
    "punch": lambda fd, other: fdops.punch_hole(fd, 0, PAGE_SIZE),
    "truncate": lambda fd, other: os.ftruncate(fd, 0),
}


@pytest.mark.parametrize("name", FD_CALLS)
def test_sealed_fd_refuses_what_destroys_pages_and_counts_on(observed: Pair, name: str) -> None:
    memory, guest = observed
    other = os.memfd_create("other")
    guest.poke(b"x", SHARED)
    before = memory.shared.resident_bytes()

    with pytest.raises(OSError) as caught:
        FD_CALLS[name](memory.shared.fd, other)

    assert caught.value.errno == errno.EBADF
    assert memory.shared.resident_bytes() == before >= PAGE_SIZE
    assert not os.get_inheritable(memory.shared.fd)
    os.close(other)


def test_seal_leaves_no_other_way_to_the_file_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    backing = ProtectedMemfdBacking(page(1))

    backing.seal()
    backing.seal()

    assert len(set(os.listdir("/proc/self/fd")) - before) == 1
    backing.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_pages_cannot_be_given_back(observed: Pair) -> None:
    memory, guest = observed
    guest.poke(b"stays", SHARED)

    with pytest.raises(PrivateAccess, match="can't be taken back"):
        memory.discard(SHARED, PAGE_SIZE)
    with pytest.raises(OSError, match="can't be given back"):
        memory.discard_shared(pages(16, 1))

    assert guest.peek(5, SHARED) == b"stays"


# -- what is known --------------------------------------------------------------------------------


def test_states_are_observed_and_no_others(observed: Pair) -> None:
    memory, _ = observed

    assert not memory.told
    assert memory.states() == [(pages(0, 64), PageState.OBSERVED)]
    assert memory.bytes_in(PageState.OBSERVED) == page(64)
    assert memory.bytes_in(PageState.PRIVATE) == memory.bytes_in(PageState.SHARED) == 0


@pytest.mark.parametrize(("most", "expected"), [(4, (4, 3, 1)), (64, (64, 48, 16)), (999, None)])
def test_observation_counts_what_it_tried(
    observed: Pair, most: int, expected: tuple[int, int, int] | None
) -> None:
    found = observed[0].observe(most)

    assert found == Observation(*(expected or (64, 48, 16)))


def test_observation_of_split_ram_stays_in_ram() -> None:
    ram = (pages(4, 4), pages(100, 4))
    with protected_memory(pages(100, 4), ram=ram) as (memory, _):
        assert memory.observe() == Observation(8, 4, 4)


def test_accounting_says_what_nobody_knows(observed: Pair) -> None:
    memory, guest = observed
    guest.poke(b"x", SHARED)

    found = memory.accounted()

    assert (found["private_bytes"], found["shared_bytes"]) == (None, None)
    assert found["donated_bytes"] == 0
    assert found["resident_bytes"] == PAGE_SIZE


def test_other_system_call_failures_are_not_taken_for_private_pages(
    observed: Pair, disk: int
) -> None:
    closed = os.dup(disk)
    os.close(closed)

    with pytest.raises(KvmError) as caught:
        observed[0].transfer_in(closed, 0, SHARED, 1)

    assert caught.value.errno == errno.EBADF


def test_backing_says_of_itself_what_the_host_can_do() -> None:
    backing = ProtectedMemfdBacking(PAGE_SIZE)
    plain = MemfdBacking(PAGE_SIZE)

    assert (backing.host_access, plain.host_access) == ("kernel-refused", "policy-refused")
    assert not (backing.traits.pread or backing.traits.pwrite or backing.traits.splice)
    backing.close()
    plain.close()
