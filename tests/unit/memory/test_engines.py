"""Data-path engines: all move the same bytes, and each goes the way it says."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm_bindings import fdops
from tests.support.memory import guest_memory, page, pages, pattern
from vmm.core.errors import HostError, PrivateAccess
from vmm.memory import transfer
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
def disk(tmp_path: Path) -> Iterator[int]:
    """A file on a file system, 30 pages of pattern."""
    path = tmp_path / "disk"
    path.write_bytes(pattern(page(30)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture(params=ENGINES)
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


def test_engine_is_short_at_the_disks_end(memory: GuestMemory, disk: int, engine: Engine) -> None:
    assert memory.through(engine).transfer_in(disk, page(29), 0, page(3)) == page(1)
    assert memory.through(engine).transfer_in(disk, page(31), 0, page(3)) == 0


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

    monkeypatch.setattr(transfer, "copy_by_copy_file_range", refused)
    monkeypatch.setattr(transfer, "copy_by_splice", refused)
    engine = make_engine("fd2fd", memory.shared)

    for _ in range(2):
        memory.through(engine).transfer_in(disk, 0, 0, 512)

    assert engine.as_dict() == {
        "name": "fd2fd",
        "bytes": {"copy_file_range": 0, "splice": 0, "buffer": 1024},
        "fallbacks": 2,
    }


@pytest.mark.parametrize(
    ("name", "size", "way"),
    [
        ("pread", page(20), "buffer"),
        ("auto", transfer.SPLICE_FROM, "splice"),
        ("auto", transfer.SPLICE_FROM - 1, "buffer"),
        ("mmap", 512, "memcpy"),
    ],
)
def test_engine_goes_the_way_it_is_named_after(
    memory: GuestMemory, disk: int, name: str, size: int, way: str
) -> None:
    engine = make_engine(name, memory.shared)

    memory.through(engine).transfer_in(disk, 0, 0, size)

    assert {key: value for key, value in engine.bytes_by.items() if value} == {way: size}
    assert engine.fallbacks == 0
    engine.close()


def test_mapped_write_past_the_files_end_is_refused(memory: GuestMemory, disk: int) -> None:
    engine = make_engine("mmap", memory.shared)

    with pytest.raises(OSError, match="the file ends"):
        memory.through(engine).transfer_out(0, page(2), disk, page(29))

    engine.close()


def test_engine_without_pread_on_the_shared_side_is_refused(memory: GuestMemory) -> None:
    memory.shared.access = "/proc/self/mem"

    with pytest.raises(HostError, match="io=pread.*has /proc/self/mem only"):
        make_engine("pread", memory.shared)
