"""What the kernel is advised of a disk's reads: nothing is read ahead into holes."""

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
from vmm.devices.virtio.block_file import ReadAhead

MIB = 1 << 20
UNWRITTEN = 1 << 11
NORMAL, RANDOM, DROP = os.POSIX_FADV_NORMAL, os.POSIX_FADV_RANDOM, os.POSIX_FADV_DONTNEED
SLOW = 2 * ReadAhead.WAITED


class Advised:
    """A file of 128 MiB, what the model of its file system says of its extents, and the advice."""

    def __init__(self, fd: int, patch: pytest.MonkeyPatch) -> None:
        self.fd = fd
        self.extents: list[tuple[int, int, int]] = []
        """Offset, size, flags."""
        self.error = 0
        self.advice: list[tuple[int, int, int]] = []
        patch.setattr(fcntl, "ioctl", self._ioctl)
        patch.setattr(os, "posix_fadvise", self._advise)
        patch.setattr(time, "monotonic", lambda: 0.0)

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
        return [(at, at + size) for at, size, advice in self.advice if advice == DROP]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Advised]:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 128 * MIB)
    fd = os.open(path, os.O_RDONLY)
    yield Advised(fd, monkeypatch)
    os.close(fd)


def test_reads_are_not_read_ahead_of_until_one_has_to_be_waited_for(file: Advised) -> None:
    file.extents = [(0, 128 * MIB, 0)]
    reads = ReadAhead(file.fd)

    assert file.advice == [(0, 0, RANDOM)]
    assert not any(reads.is_due(ReadAhead.WAITED / 2, MIB) for _ in range(100))
    assert reads.is_due(SLOW, 4096)
    assert not reads.is_due(SLOW, 4 * MIB)  # as quick as memory


def test_data_behind_a_slow_read_are_read_ahead(file: Advised) -> None:
    file.extents = [(0, 20 * MIB, 0), (20 * MIB, 108 * MIB, 0)]
    reads = ReadAhead(file.fd)

    reads.look(10 * MIB)
    reads.look(11 * MIB)

    assert file.advice[1:] == [(0, 0, NORMAL)]


def test_reads_that_are_read_ahead_of_are_looked_at_now_and_then(file: Advised) -> None:
    file.extents = [(0, 128 * MIB, 0)]
    reads = ReadAhead(file.fd)
    reads.look(0)

    found = []
    for _ in range(17):
        found.append(reads.is_due(0.0, MIB))
        if found[-1]:
            reads.look(0)

    assert found == [i in (7, 15) for i in range(17)]


def test_read_ahead_ends_before_a_hole_and_what_is_there_goes(file: Advised) -> None:
    file.extents = [(0, 64 * MIB, 0)]
    reads = ReadAhead(file.fd)
    reads.look(31 * MIB)

    reads.look(33 * MIB)

    assert file.advice[1:3] == [(0, 0, NORMAL), (0, 0, RANDOM)]
    assert file.dropped()[0] == (33 * MIB, 36 * MIB)  # pieces end where no large page does not
    assert file.dropped()[-1] == (48 * MIB, 49 * MIB)


def test_slow_read_before_a_hole_drops_the_hole_alone(file: Advised) -> None:
    file.extents = [(0, 10 * MIB, 0), (11 * MIB, MIB, 0)]
    reads = ReadAhead(file.fd)

    reads.look(9 * MIB)

    assert {advice for *_, advice in file.advice} == {RANDOM, DROP}
    assert file.dropped()[:3] == [(10 * MIB, 11 * MIB), (12 * MIB, 16 * MIB), (16 * MIB, 20 * MIB)]


def test_holes_are_what_is_between_extents_and_what_was_never_written(file: Advised) -> None:
    """fallocate(1) makes the latter."""
    file.extents = [(0, MIB, 0), (2 * MIB, 2 * MIB, UNWRITTEN), (4 * MIB, 2 * MIB, 0)]

    assert read_ahead.holes(file.fd, 512, 8 * MIB) == [(MIB, 4 * MIB), (6 * MIB, 8 * MIB + 512)]


def test_holes_end_with_the_file(file: Advised) -> None:
    assert read_ahead.holes(file.fd, 127 * MIB, 4 * MIB) == [(127 * MIB, 128 * MIB)]
    assert read_ahead.holes(file.fd, 128 * MIB, 4 * MIB) == []


def test_holes_behind_many_extents_are_all_that_is_left(file: Advised) -> None:
    """A guest can write every second page."""
    file.extents = [(8192 * i, 4096, 0) for i in range(4000)]

    found = read_ahead.holes(file.fd, 0, 16 * MIB)

    assert found[0] == (4096, 8192)
    assert found[-1][1] == 16 * MIB
    assert len(found) == 64


def test_holes_are_none_where_the_file_system_does_not_tell(file: Advised) -> None:
    file.error = errno.EOPNOTSUPP

    assert read_ahead.holes(file.fd, 0, MIB) == []


def test_drop_ends_when_it_takes_long(file: Advised, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that wait to be written are written first."""
    times = iter([0.0, 0.001, 1.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))

    read_ahead.drop(file.fd, [(0, 64 * MIB)])

    assert file.dropped() == [(0, 4 * MIB), (4 * MIB, 8 * MIB)]


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
            fcntl.ioctl(file.fileno(), 0xC020660B, probe)
        except OSError:
            pytest.skip("this file system has no FIEMAP; TMPDIR can name a folder on another one")

        found = read_ahead.holes(file.fileno(), 0, MIB)

    assert found == [(4096, 512 << 10), ((512 << 10) + 4096, MIB)]
