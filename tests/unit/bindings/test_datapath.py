"""Many system calls at once: the right bytes, short files, errors with a name."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator

import pytest

from kvm_bindings import KvmError, datapath


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test")
    os.pwrite(fd, bytes(range(256)) * 64, 0)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_pread_many_gives_the_pieces_in_their_order(memfd: int) -> None:
    assert datapath.pread_many(memfd, [100, 3, 0, 2, 5, 0], 5) == bytes([100, 101, 102, 0, 1])


def test_pwrite_many_lays_the_data_over_the_pieces(memfd: int) -> None:
    datapath.pwrite_many(memfd, [10, 2, 0, 1], b"abc")

    assert os.pread(memfd, 12, 0) == b"c" + bytes(range(1, 10)) + b"ab"


def test_pread_many_past_the_end_is_an_error(memfd: int) -> None:
    with pytest.raises(KvmError) as raised:
        datapath.pread_many(memfd, [0, 1, 1 << 20, 4], 5)

    assert raised.value.errno == errno.EIO


@pytest.mark.parametrize("splice_from", [0, 1000, datapath.NEVER])
@pytest.mark.parametrize("room", [100, 1 << 16])
def test_move_many_moves_all_pieces(
    memfd: int, pipe: tuple[int, int], splice_from: int, room: int
) -> None:
    target = os.memfd_create("target")
    moves = [0, 7, 5000, 9000, 6000, 10]

    moved = datapath.move_many(memfd, target, moves, datapath.Buffer(room), pipe, splice_from)

    content = os.pread(memfd, 1 << 16, 0)
    expected = bytes(7) + content[:5000] + bytes(6000 - 5007) + content[9000:9010]
    assert moved == 5010
    assert os.pread(target, 1 << 16, 0) == expected
    os.close(target)


@pytest.mark.parametrize("splice_from", [0, datapath.NEVER])
def test_move_many_stops_at_the_sources_end(
    memfd: int, pipe: tuple[int, int], splice_from: int
) -> None:
    target = os.memfd_create("target")
    moves = [16000, 0, 1000, 0, 5000, 10]

    assert datapath.move_many(memfd, target, moves, datapath.Buffer(64), pipe, splice_from) == 384
    os.close(target)


@pytest.mark.parametrize("splice_from", [0, datapath.NEVER])
def test_move_many_that_takes_too_long_stops_between_two_pieces(
    pipe: tuple[int, int], splice_from: int
) -> None:
    """No time at all is too long; 256 KiB go between two looks at the clock."""
    source, target = os.memfd_create("source"), os.memfd_create("target")
    os.truncate(source, 1 << 20)
    moves = [number for i in range(8) for number in (i << 17, i << 17, 1 << 17)]

    moved = datapath.move_many(
        source, target, moves, datapath.Buffer(1 << 17), pipe, splice_from, 0
    )

    assert 256 << 10 <= moved < 1 << 20
    assert os.stat(target).st_size == moved
    os.close(source)
    os.close(target)


def test_move_many_that_splice_refuses_is_an_error(memfd: int, pipe: tuple[int, int]) -> None:
    eventfd = os.eventfd(0)

    with pytest.raises(OSError, match="copying from source=") as raised:
        datapath.move_many(eventfd, memfd, [0, 0, 8], datapath.Buffer(8), pipe, 0)

    assert raised.value.errno in (errno.EINVAL, errno.ESPIPE)
    os.close(eventfd)


def test_move_many_that_is_interrupted_lets_handlers_run_and_begins_again(
    memfd: int, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    answers = [-errno.EINTR, -errno.EINTR, 8]

    class Interrupted:
        """Stands for a file system that signals interrupt; one comes with each call."""

        @staticmethod
        def pyvmm_move_many(*_: object) -> int:
            signal.raise_signal(signal.SIGUSR1)
            return answers.pop(0)

    monkeypatch.setattr(datapath, "lib", Interrupted)
    former = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        moved = datapath.move_many(memfd, memfd, [0, 8, 8], datapath.Buffer(8), pipe, 0)
    finally:
        signal.signal(signal.SIGUSR1, former)

    assert moved == 8
    assert seen == [signal.SIGUSR1] * 3
