"""Data-path engines: all move the same bytes, and each goes the way it says."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings import KvmError, datapath, fdops, mapped
from tests.support.memory import guest_memory, page, pages, pattern
from vmm.core.errors import HostError, PrivateAccess
from vmm.memory import transfer
from vmm.memory.backing import Traits
from vmm.memory.backings.mapped import MappedBacking
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.engines import Engine, make_engine
from vmm.memory.guest_memory import GuestMemory
from vmm.memory.transfer import ENGINES

SIZE = page(20) + 100  # no multiple of anything


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 pages, the upper half private; KVM's mappings out of everybody's reach."""
    with guest_memory(pages(32, 32)) as made:
        fdops.protect(made.shared.hva, made.shared.size, fdops.PROT_NONE)
        yield made


@pytest.fixture
def reachable() -> Iterator[GuestMemory]:
    """As `memory`, with mappings that the kernel reaches, as it does in a run."""
    with guest_memory(pages(32, 32)) as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    """A file on a file system, 30 pages of pattern."""
    path = tmp_path / "disk"
    path.write_bytes(pattern(page(30)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


# The VM's fd is another one, which only a changed kernel has: see tests/lab.
@pytest.fixture(params=[name for name in ENGINES if name != "vmfd"])
def engine(request: pytest.FixtureRequest, memory: GuestMemory) -> Iterator[Engine]:
    made = make_engine(request.param, memory.shared)
    yield made
    made.close()


def test_engine_reads_the_disk(memory: GuestMemory, disk: int, engine: Engine) -> None:
    moved = memory.through(engine).transfer_in(disk, 50, 7, SIZE)

    assert moved == SIZE
    assert memory.pread(SIZE + 9, 0) == bytes(7) + pattern(page(30))[50 : 50 + SIZE] + bytes(2)
    assert sum(engine.bytes_by.values()) == SIZE


def test_engine_writes_the_disk(memory: GuestMemory, disk: int, engine: Engine) -> None:
    data = pattern(SIZE, seed=7)
    memory.pwrite(data, 9)

    moved = memory.through(engine).transfer_out(9, SIZE, disk, 50)

    assert moved == SIZE
    assert os.pread(disk, SIZE + 60, 0) == pattern(50) + data + pattern(page(30))[50 + SIZE :][:10]


def test_engine_reads_and_then_writes_the_same_disk(
    memory: GuestMemory, disk: int, engine: Engine
) -> None:
    memory.through(engine).transfer_in(disk, 0, 0, page(2))
    memory.through(engine).transfer_out(0, page(2), disk, page(5))

    assert os.pread(disk, page(2), page(5)) == pattern(page(2))


def test_engine_moves_many_pieces(memory: GuestMemory, disk: int, engine: Engine) -> None:
    seen = memory.through(engine)

    assert seen.move_in(disk, [50, 7, 600, 9000, 5000, page(16)]) == 600 + page(16)
    assert seen.move_out([5000, 0, page(16), 7, page(20), 600], disk) == 600 + page(16)

    content = pattern(page(30))
    assert memory.pread(600, 7) == content[50:650]
    assert memory.pread(page(16), 5000) == content[9000 : 9000 + page(16)]
    assert os.pread(disk, page(16), 0) == content[9000 : 9000 + page(16)]
    assert os.pread(disk, 600, page(20)) == content[50:650]
    assert sum(engine.bytes_by.values()) == 2 * (600 + page(16))


def test_engine_moves_nothing_where_one_of_many_pieces_is_private(
    memory: GuestMemory, disk: int, engine: Engine
) -> None:
    with pytest.raises(PrivateAccess):
        memory.through(engine).move_in(disk, [0, 0, 512, 512, page(32), 512])

    assert memory.shared.resident_bytes() == 0


def test_pieces_around_private_memory_are_read_and_written(memory: GuestMemory) -> None:
    with guest_memory(pages(10, 1)) as split:
        split.write_many([0, 2, page(11), 3], b"abcde")

        assert split.read_many([page(11), 3, 0, 2]) == b"cdeab"
        with pytest.raises(PrivateAccess):
            split.write_many([0, 1, page(10) + 5, 1], b"xy")
        assert split.pread(1, 0) == b"a"


def test_engine_is_short_at_the_disks_end(memory: GuestMemory, disk: int, engine: Engine) -> None:
    assert memory.through(engine).transfer_in(disk, page(29), 0, page(3)) == page(1)
    assert memory.through(engine).transfer_in(disk, page(31), 0, page(3)) == 0


def test_engine_counts_what_it_moved_where_the_disk_ends_in_the_middle(
    memory: GuestMemory, disk: int, engine: Engine
) -> None:
    moved = memory.through(engine).move_in(disk, [0, 0, 512, page(20), page(8), page(17)])

    assert moved == 512 + page(10)
    assert sum(engine.bytes_by.values()) == moved


def test_fds_count_the_ways_of_a_batch_that_the_disks_end_cuts_short(
    memory: GuestMemory, disk: int
) -> None:
    engine = make_engine("auto", memory.shared, may_be_buffer=False)
    moves = [0, 0, 512, page(28), page(8), page(16), 0, 512, 512]

    moved = memory.through(engine).move_in(disk, moves)

    assert moved == 512 + page(2)
    assert engine.bytes_by == {"splice": page(2), "buffer": 512}


def test_engine_does_not_touch_private_pages(
    memory: GuestMemory, disk: int, engine: Engine
) -> None:
    seen = memory.through(engine)

    with pytest.raises(PrivateAccess):
        seen.transfer_in(disk, 0, page(31), page(2))
    with pytest.raises(PrivateAccess):
        seen.transfer_out(page(31), page(2), disk, 0)

    assert memory.shared.resident_bytes() == 0
    assert os.pread(disk, page(30), 0) == pattern(page(30))


@pytest.mark.parametrize("size", [512, page(16)])
def test_fd2fd_brings_no_byte_into_user_space(
    memory: GuestMemory, disk: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("fd2fd", memory.shared)
    # Every call by which Python could see the data: none may be made.
    for name in ("read", "readv", "pread", "preadv", "write", "writev", "pwrite", "pwritev"):
        monkeypatch.delattr(os, name)

    moved = memory.through(engine).transfer_in(disk, 0, 0, size)
    moved += memory.through(engine).transfer_out(0, size, disk, 0)

    monkeypatch.undo()
    assert moved == 2 * size
    assert engine.bytes_by["buffer"] == 0
    assert engine.fallbacks == 0
    assert memory.pread(size, 0) == pattern(size)


def test_fd2fd_that_is_refused_falls_back_and_says_so(
    memory: GuestMemory, disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: int) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(transfer, "copy_by_splice", refused)
    engine = make_engine("fd2fd", memory.shared)

    for _ in range(2):
        memory.through(engine).transfer_in(disk, 0, 0, 512)
    memory.through(engine).move_in(disk, [0, 0, 512, 0, 512, 512])

    assert engine.as_dict() == {
        "name": "fd2fd",
        "bytes": {"splice": 0, "buffer": 2048},
        "fallbacks": 4,
    }


def test_fd2fd_that_is_refused_for_many_pieces_falls_back_and_says_so(
    memory: GuestMemory, disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    real = datapath.move_many

    def move_many(*arguments: Any) -> int:
        tried.append(arguments[5])
        if arguments[5] == 0:
            raise KvmError("copy", errno.EINVAL)
        return int(real(*arguments))

    monkeypatch.setattr(datapath, "move_many", move_many)
    engine = make_engine("fd2fd", memory.shared)

    for _ in range(2):
        assert memory.through(engine).move_in(disk, [0, 0, 512, 0, 512, 512]) == 1024

    never = datapath.NEVER
    assert tried == [0, never, never]
    assert engine.bytes_by["buffer"] == 2048
    assert engine.fallbacks == 4


@pytest.mark.parametrize(
    ("name", "size", "way"),
    [
        ("pread", page(20), "buffer"),
        ("auto", transfer.SPLICE_FROM, "hva"),
        ("auto", transfer.SPLICE_FROM - 1, "buffer"),
        ("hva", 512, "hva"),
        ("mmap", 512, "memcpy"),
    ],
)
def test_engine_goes_the_way_it_is_named_after(
    reachable: GuestMemory, disk: int, name: str, size: int, way: str
) -> None:
    engine = make_engine(name, reachable.shared)
    seen = reachable.through(engine)

    seen.transfer_in(disk, 0, 0, size)
    seen.transfer_out(0, size, disk, 0)
    seen.move_in(disk, [0, 0, size])
    seen.move_out([0, 0, size], disk)

    assert {key: value for key, value in engine.bytes_by.items() if value} == {way: 4 * size}
    assert engine.fallbacks == 0
    engine.close()


def test_auto_goes_by_the_fds_where_no_mapping_may_be_a_buffer(
    reachable: GuestMemory, disk: int
) -> None:
    engine = make_engine("auto", reachable.shared, may_be_buffer=False)

    reachable.through(engine).transfer_in(disk, 0, 0, SIZE)

    assert engine.bytes_by == {"splice": SIZE, "buffer": 0}


def test_hva_moves_what_the_fds_would(reachable: GuestMemory, disk: int) -> None:
    engine = make_engine("hva", reachable.shared)
    seen = reachable.through(engine)
    content = pattern(page(30))

    moved = seen.move_in(disk, [50, 7, 600, 9000, 5000, page(16)])
    moved += seen.transfer_in(disk, 1, page(24), 5000)
    moved += seen.move_out([5000, 0, page(16), 7, page(20), 600], disk)
    moved += seen.transfer_out(page(24), 5000, disk, page(22))

    assert moved == 2 * (600 + page(16) + 5000)
    assert engine.bytes_by == {"hva": moved, "splice": 0, "buffer": 0}
    assert reachable.pread(600, 7) == content[50:650]
    assert reachable.pread(page(16), 5000) == content[9000 : 9000 + page(16)]
    assert os.pread(disk, page(16), 0) == content[9000 : 9000 + page(16)]
    assert os.pread(disk, 600, page(20)) == content[50:650]
    assert os.pread(disk, 5000, page(22)) == content[1:5001]


@pytest.fixture
def torn(reachable: GuestMemory) -> GuestMemory:
    """Shared memory in whose mapping the kernel reaches all pages but the fourth."""
    fdops.protect(reachable.shared.hva + page(3), page(1), fdops.PROT_NONE)
    return reachable


def test_hva_that_meets_a_page_out_of_reach_falls_back_and_counts_each_byte_once(
    torn: GuestMemory, disk: int
) -> None:
    engine = make_engine("hva", torn.shared)
    seen = torn.through(engine)

    assert seen.move_in(disk, [0, 0, page(2), page(2), page(2), page(4)]) == page(6)
    assert seen.transfer_in(disk, page(6), page(2), page(3)) == page(3)
    assert seen.move_out([page(2), page(7), page(4)], disk) == page(4)
    assert seen.transfer_out(page(3), page(1), disk, 0) == page(1)

    content = pattern(page(30))
    expected = content[: page(2)] + content[page(6) : page(9)] + content[page(5) : page(6)]
    assert torn.pread(page(6), 0) == expected
    assert os.pread(disk, page(4), page(7)) == expected[page(2) :]
    assert os.pread(disk, page(1), 0) == expected[page(3) : page(4)]
    assert engine.bytes_by["hva"] == 0
    assert sum(engine.bytes_by.values()) == page(14)
    assert engine.fallbacks == 5


def test_hva_in_parts_counts_each_byte_once_where_a_late_part_falls_back(
    torn: GuestMemory, disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "UNINTERRUPTED", page(1))
    engine = make_engine("hva", torn.shared)

    assert torn.through(engine).transfer_in(disk, 0, 0, page(8)) == page(8)
    assert torn.through(engine).transfer_in(disk, 0, page(8), page(8)) == page(8)

    assert torn.pread(page(16), 0) == 2 * pattern(page(30))[: page(8)]
    assert engine.bytes_by["hva"] == page(8)
    assert sum(engine.bytes_by.values()) == page(16)
    assert engine.fallbacks == 1


def test_hva_has_the_fds_error_where_neither_way_works(
    reachable: GuestMemory, disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(*_: Any) -> int:
        raise KvmError("pread", errno.EFAULT)

    def no_space(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(mapped, "move_in", out_of_reach)
    monkeypatch.setattr(datapath, "move_many", no_space)
    seen = reachable.through(make_engine("hva", reachable.shared))

    attempts: list[Callable[[], int]] = [
        lambda: seen.move_in(disk, [0, 0, 512]),
        lambda: seen.transfer_in(disk, 0, 0, 8),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match="no") as caught:
            attempt()
        assert caught.value.errno == errno.ENOSPC


def test_hva_passes_on_the_disks_own_error(reachable: GuestMemory, tmp_path: Path) -> None:
    engine = make_engine("hva", reachable.shared)
    directory = os.open(tmp_path, os.O_RDONLY)

    with pytest.raises(OSError, match="EISDIR"):
        reachable.through(engine).transfer_in(directory, 0, 0, 512)

    os.close(directory)
    assert engine.fallbacks == 0


def test_moves_outside_the_mapping_are_refused_before_a_byte_moves(
    reachable: GuestMemory, disk: int
) -> None:
    side = reachable.shared
    for offset, size in ((side.size, 1), (side.size - 1, 2), ((1 << 64) - 1, 2), (1, side.size)):
        with pytest.raises(KvmError, match="EINVAL"):
            mapped.move_in(disk, side.hva, side.size, [0, 0, 512, 0, offset, size])
        with pytest.raises(KvmError, match="EINVAL"):
            mapped.move_out(disk, side.hva, side.size, [0, 0, 512, offset, 0, size])

    assert side.resident_bytes() == 0
    assert os.pread(disk, page(30), 0) == pattern(page(30))


def test_move_that_takes_too_long_ends_early(reachable: GuestMemory, tmp_path: Path) -> None:
    size = 1 << 18  # after so many bytes the clock is looked at
    path = tmp_path / "large"
    path.write_bytes(bytes(size))
    fd = os.open(path, os.O_RDWR)
    backing = MemfdBacking(2 * size)
    try:
        moves = [0, 0, size, 0, size, size]
        assert mapped.move_in(fd, backing.hva, backing.size, moves, 0) == size
        assert mapped.move_out(fd, backing.hva, backing.size, moves[:3], 0) == size
        assert mapped.move_in(fd, backing.hva, backing.size, moves) == 2 * size
    finally:
        backing.close()
        os.close(fd)


def test_hva_never_has_a_private_page_for_a_buffer(
    reachable: GuestMemory, disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[object] = []
    monkeypatch.setattr(mapped, "move_in", lambda *words: called.append(words))
    monkeypatch.setattr(mapped, "move_out", lambda *words: called.append(words))
    seen = reachable.through(make_engine("hva", reachable.shared))

    attempts: list[Callable[[], int]] = [
        lambda: seen.transfer_in(disk, 0, page(31), page(2)),
        lambda: seen.transfer_out(page(32), 1, disk, 0),
        lambda: seen.move_in(disk, [0, 0, 512, 512, page(31), page(2)]),
        lambda: seen.move_out([0, 0, 512, page(63), 512, 512], disk),
    ]
    for attempt in attempts:
        with pytest.raises(PrivateAccess):
            attempt()

    assert called == []


def test_mapped_write_past_the_files_end_is_refused(memory: GuestMemory, disk: int) -> None:
    engine = make_engine("mmap", memory.shared)

    with pytest.raises(OSError, match="the file ends"):
        memory.through(engine).transfer_out(0, page(2), disk, page(29))

    engine.close()


@pytest.fixture
def without_pread() -> Iterator[GuestMemory]:
    """Shared memory as on a guest_memfd: reached by system calls into a mapping."""
    side = ByMapping(page(4))
    made = GuestMemory([pages(0, 4)], side)
    yield made
    made.close()


class ByMapping(MappedBacking):
    """A memfd that may be used through its mapping only."""

    name = "by-mapping"
    is_guest_memfd = False
    traits = Traits(False, False, False, True, "allowed")

    def __init__(self, size: int) -> None:
        fd = os.memfd_create("side", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        super().__init__(fd, size)

    def resident_bytes(self, offset: int = 0, size: int = 0) -> int:
        return 0


def test_auto_without_pread_on_the_shared_side_goes_the_backings_way(
    without_pread: GuestMemory, disk: int
) -> None:
    engine = make_engine("auto", without_pread.shared)

    moved = without_pread.through(engine).transfer_in(disk, 5, 100, 5000)
    moved += without_pread.through(engine).transfer_out(100, 5000, disk, 0)

    assert moved == 10_000
    assert os.pread(disk, 5000, 0) == pattern(page(30))[5:5005]
    assert engine.bytes_by == {"/proc/self/mem": 10_000}


@pytest.mark.parametrize("name", ["pread", "fd2fd", "hva", "mmap"])
def test_other_engine_without_pread_on_the_shared_side_is_refused(
    without_pread: GuestMemory, name: str
) -> None:
    with pytest.raises(HostError, match=f"io={name} needs pread.*by-mapping has /proc/self/mem"):
        make_engine(name, without_pread.shared)


def test_mapped_disk_of_several_queues_is_mapped_once(
    memory: GuestMemory, disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two queues' threads, the second of which comes while the first one maps."""
    engine = make_engine("mmap", memory.shared)
    map_shared = fdops.map_shared
    maps: list[int] = []
    other = threading.Thread(target=engine.transfer_in, args=(disk, 0, 0, 512))

    def mapped(fd: int, size: int, **options: bool) -> int:
        maps.append(fd)
        if len(maps) == 1:
            other.start()
            other.join(0.05)
        return map_shared(fd, size, **options)

    monkeypatch.setattr(fdops, "map_shared", mapped)

    engine.transfer_in(disk, 0, 4096, 512)
    other.join()

    assert maps == [disk]
    engine.close()


def test_engine_on_the_vm_needs_a_vm_fd_that_can_be_read(memory: GuestMemory) -> None:
    ends = os.pipe()
    try:
        with pytest.raises(HostError, match=r"io=vmfd needs .* pread says ESPIPE; .*experimental"):
            make_engine("vmfd", memory.shared, ends[0])
    finally:
        os.close(ends[0])
        os.close(ends[1])


def test_engine_on_the_vm_moves_bytes_by_guest_physical_address(
    memory: GuestMemory, disk: int
) -> None:
    # The shared side's file has guest-physical addresses for offsets, as the VM's fd would.
    engine = make_engine("vmfd", memory.shared, memory.shared.fd)

    moved = memory.through(engine).transfer_in(disk, 0, page(3), page(2))
    memory.through(engine).transfer_out(page(3), page(2), disk, page(7))

    assert moved == page(2)
    assert memory.pread(page(2), page(3)) == pattern(page(30))[: page(2)]
    assert os.pread(disk, page(2), page(7)) == pattern(page(30))[: page(2)]
    assert engine.as_dict()["name"] == "vmfd"
    engine.close()


@pytest.mark.parametrize("name", ["hva", "mmap"])
def test_mapping_engine_is_refused_where_private_pages_are_in_the_same_file(
    name: str, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place = memory.shared.traits._replace(in_place=True)
    monkeypatch.setattr(memory.shared, "traits", in_place)

    with pytest.raises(HostError, match=rf"io={name}: .*SIGBUS"):
        make_engine(name, memory.shared)
