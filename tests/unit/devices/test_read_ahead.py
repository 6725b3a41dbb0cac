"""Holes behind a slow read: found, and not read ahead any more."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm.devices.virtio import read_ahead
from vmm.devices.virtio.read_ahead import AHEAD, keep_from_zeroing

MIB = 1 << 20
UNWRITTEN = 1 << 11
NORMAL = (0, 0, os.POSIX_FADV_NORMAL)


class Advised:
    """A file, what the model of its file system says of its extents, and the advice given."""

    def __init__(self, fd: int, patch: pytest.MonkeyPatch) -> None:
        self.fd = fd
        self.extents: list[tuple[int, int, int]] = []
        """Offset, size, flags."""
        self.error = 0
        self.advice: list[tuple[int, int, int]] = []
        patch.setattr(fcntl, "ioctl", self._ioctl)
        patch.setattr(os, "posix_fadvise", self._advise)

    def _ioctl(self, fd: int, request: int, argument: bytearray) -> int:
        assert (fd, request) == (self.fd, 0xC020660B)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        start, size, _, _, room, _ = struct.unpack_from("<QQIIII", argument)
        found = [e for e in self.extents if e[0] < start + size and e[0] + e[1] > start][:room]
        struct.pack_into("<I", argument, 20, len(found))
        for number, (offset, length, flags) in enumerate(found):
            struct.pack_into("<QQQ16xI", argument, 32 + 56 * number, offset, 0, length, flags)
        return 0

    def _advise(self, fd: int, offset: int, size: int, advice: int) -> None:
        assert fd == self.fd
        self.advice.append((offset, size, advice))

    def dropped(self) -> list[tuple[int, int]]:
        """Start and end of each range that was dropped."""
        return [
            (offset, offset + size)
            for offset, size, advice in self.advice
            if advice == os.POSIX_FADV_DONTNEED
        ]


@pytest.fixture
def advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Advised]:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 64 * MIB)
    fd = os.open(path, os.O_RDONLY)
    yield Advised(fd, monkeypatch)
    os.close(fd)


def test_read_ahead_of_data_is_left_to_the_kernel(advised: Advised) -> None:
    advised.extents = [(0, 20 * MIB, 0), (20 * MIB, 44 * MIB, 0)]

    keep_from_zeroing(advised.fd, 10 * MIB)

    assert advised.advice == [NORMAL]


def test_read_ahead_of_a_hole_ends_and_what_is_there_of_it_goes(advised: Advised) -> None:
    advised.extents = [(0, 10 * MIB, 0), (11 * MIB, MIB, 0)]

    keep_from_zeroing(advised.fd, 9 * MIB)

    assert advised.advice[0] == (0, 0, os.POSIX_FADV_RANDOM)
    assert advised.dropped() == [
        (10 * MIB, 11 * MIB),
        (12 * MIB, 16 * MIB), (16 * MIB, 20 * MIB), (20 * MIB, 24 * MIB), (24 * MIB, 25 * MIB),
    ]  # fmt: skip


def test_read_ahead_of_unwritten_extents_is_that_of_holes(advised: Advised) -> None:
    """fallocate(1) makes such; what is cached of them doesn't show in lseek's SEEK_HOLE."""
    advised.extents = [(0, 64 * MIB, UNWRITTEN)]

    keep_from_zeroing(advised.fd, 60 * MIB)

    assert advised.dropped() == [(60 * MIB, 64 * MIB)]


def test_read_ahead_of_every_second_page_ends(
    advised: Advised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    advised.extents = [(8192 * i, 4096, 0) for i in range(4000)]

    keep_from_zeroing(advised.fd, 0)

    assert advised.dropped() == [(at + 4096, at + 8192) for at in range(0, AHEAD, 8192)]


def test_read_ahead_behind_more_extents_than_are_asked_for_ends(advised: Advised) -> None:
    """Where a guest's file is in so many pieces, what isn't known of it is taken for a hole."""
    advised.extents = [(4096 * i, 4096, 0) for i in range(4096)]

    keep_from_zeroing(advised.fd, 0)

    assert advised.dropped() == [(AHEAD // 2, 12 * MIB), (12 * MIB, AHEAD)]


def test_read_ahead_at_the_files_end_and_beyond_is_left_to_the_kernel(advised: Advised) -> None:
    keep_from_zeroing(advised.fd, 64 * MIB)
    keep_from_zeroing(advised.fd, 65 * MIB)

    assert advised.advice == [NORMAL, NORMAL]


def test_read_ahead_where_the_file_system_does_not_tell_is_left_to_the_kernel(
    advised: Advised,
) -> None:
    advised.error = errno.EOPNOTSUPP

    keep_from_zeroing(advised.fd, 0)

    assert advised.advice == [NORMAL]


def test_read_ahead_stops_dropping_when_that_takes_long(
    advised: Advised, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that have been written in an unwritten extent go to the disk first."""
    times = iter([0.0, 0.001, 1.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))

    keep_from_zeroing(advised.fd, 0)

    assert advised.dropped() == [(0, 4 * MIB), (4 * MIB, 8 * MIB)]


def test_holes_of_a_real_file_are_found(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    os.truncate(path, MIB)
    with path.open("r+b") as file:
        file.seek(512 << 10)
        file.write(b"data")
        file.flush()
        os.fsync(file.fileno())
        probe = bytearray(struct.pack("<QQIIII56x", 0, MIB, 0, 0, 1, 0))
        try:
            fcntl.ioctl(file.fileno(), read_ahead._FS_IOC_FIEMAP, probe)
        except OSError:
            pytest.skip("this file system has no FIEMAP; TMPDIR can name a folder on another one")

        holes = read_ahead._holes(file.fileno(), 0, MIB)

    assert holes == [(4096, 512 << 10), ((512 << 10) + 4096, MIB)]
