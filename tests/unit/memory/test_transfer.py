"""fd-to-fd copies by splice and buffer: short sources, errors, fallback."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.memory import pattern
from vmm.memory import transfer
from vmm.memory.transfer import (
    SPLICE_FROM,
    FdCopier,
    copy_by_splice,
    copy_through_buffer,
)

Way = Callable[[int, int, int, int, int], int]

WAYS = [copy_by_splice, copy_through_buffer]
LARGE = (2 << 20) + 12345  # more than a pipe and a buffer hold, and no multiple of a page


@pytest.fixture
def memfd() -> Iterator[Callable[[bytes], int]]:
    fds: list[int] = []

    def make(content: bytes) -> int:
        fd = os.memfd_create("test")
        fds.append(fd)
        os.truncate(fd, len(content))
        os.pwrite(fd, content, 0)
        return fd

    yield make
    for fd in fds:
        os.close(fd)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
    """A file on another file system than memfds have."""
    fds: list[int] = []

    def make(content: bytes) -> int:
        path = tmp_path / str(len(fds))
        path.write_bytes(content)
        fds.append(os.open(path, os.O_RDWR))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


@pytest.fixture(autouse=True)
def fresh_pipe() -> Iterator[None]:
    transfer._scratches.own.drop_pipe()
    yield
    transfer._scratches.own.drop_pipe()


def bytes_in_pipe() -> int:
    """What this thread's splice pipe holds; 0 without a pipe."""
    if transfer._scratches.own.pipe is None:
        return 0
    count = array.array("i", [0])
    fcntl.ioctl(transfer._scratches.own.pipe[0], termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [0, 1, 4096, LARGE])
def test_copy_moves_exactly_the_range(way: Way, size: int, memfd: Callable[[bytes], int]) -> None:
    content = pattern(100 + size + 50)
    source, target = memfd(content), memfd(bytes(7 + size + 9))

    moved = way(source, 100, target, 7, size)

    assert moved == size
    assert os.pread(target, 7 + size + 9, 0) == bytes(7) + content[100 : 100 + size] + bytes(9)
    assert bytes_in_pipe() == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("available", [0, 1, 5000, (1 << 20) + 1])
def test_copy_of_a_short_source_stops_at_its_end(
    way: Way, available: int, memfd: Callable[[bytes], int]
) -> None:
    content = pattern(available)
    source, target = memfd(content), memfd(b"\xee" * LARGE)

    moved = way(source, 0, target, 0, LARGE)

    assert moved == available
    assert os.pread(target, LARGE, 0) == content + b"\xee" * (LARGE - available)


@pytest.mark.parametrize("way", WAYS)
def test_copy_from_past_the_sources_end_moves_nothing(
    way: Way, memfd: Callable[[bytes], int]
) -> None:
    assert way(memfd(b"abc"), 10_000, memfd(bytes(100)), 0, 100) == 0


@pytest.mark.parametrize("to_memfd", [True, False])
def test_copier_moves_between_file_systems(
    to_memfd: bool, memfd: Callable[[bytes], int], file: Callable[[bytes], int]
) -> None:
    content = pattern(LARGE)
    source = file(content) if to_memfd else memfd(content)
    target = memfd(bytes(LARGE)) if to_memfd else file(bytes(LARGE))

    moved = FdCopier().copy(source, 0, target, 0, LARGE)

    assert moved == LARGE
    assert os.pread(target, LARGE, 0) == content


class Recorder:
    """Stands in for one way: notes that it was tried, then fails or copies."""

    def __init__(self, name: str, tried: list[str], error: int | None) -> None:
        self.name, self.tried, self.error = name, tried, error

    def __call__(self, src: int, src_offset: int, dst: int, dst_offset: int, size: int) -> int:
        self.tried.append(self.name)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return copy_through_buffer(src, src_offset, dst, dst_offset, size)


def record_ways(monkeypatch: pytest.MonkeyPatch, splice_error: int | None) -> list[str]:
    tried: list[str] = []
    for name, error in (("copy_by_splice", splice_error), ("copy_through_buffer", None)):
        monkeypatch.setattr(transfer, name, Recorder(name, tried, error))
    return tried


@pytest.mark.parametrize(
    "number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS]
)
def test_copier_falls_back_from_a_way_that_does_not_work_here_and_remembers(
    number: int, memfd: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = record_ways(monkeypatch, number)
    content = pattern(SPLICE_FROM)
    source, target = memfd(content), memfd(bytes(SPLICE_FROM))
    copier = FdCopier()

    first = copier.copy(source, 0, target, 0, SPLICE_FROM)
    attempts = tried.copy()
    copier.copy(source, 0, target, 0, SPLICE_FROM)

    assert first == SPLICE_FROM
    assert os.pread(target, SPLICE_FROM, 0) == content
    assert attempts == ["copy_by_splice", "copy_through_buffer"]
    assert tried == [*attempts, "copy_through_buffer"]


def test_copier_prefers_splice_and_leaves_small_copies_to_the_buffer(
    memfd: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = record_ways(monkeypatch, None)
    source, target = memfd(bytes(SPLICE_FROM)), memfd(bytes(SPLICE_FROM))
    copier = FdCopier()

    copier.copy(source, 0, target, 0, SPLICE_FROM)
    copier.copy(source, 0, target, 0, SPLICE_FROM - 1)

    assert tried == ["copy_by_splice", "copy_through_buffer"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EFBIG])
def test_copier_reports_a_real_error_instead_of_trying_on(
    number: int, memfd: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = record_ways(monkeypatch, number)

    with pytest.raises(OSError, match=os.strerror(number)):
        FdCopier().copy(memfd(bytes(SPLICE_FROM)), 0, memfd(b""), 0, SPLICE_FROM)

    assert tried == ["copy_by_splice"]


def test_splice_that_fails_half_way_leaves_no_bytes_for_the_next_transfer(
    memfd: Callable[[bytes], int],
) -> None:
    source, target = memfd(b"old!" * 50_000), memfd(bytes(LARGE))
    sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)  # found with the pipe full

    with pytest.raises(PermissionError):
        copy_by_splice(source, 0, sealed, 0, 200_000)

    os.close(sealed)
    assert bytes_in_pipe() == 0
    content = pattern(LARGE)
    assert copy_by_splice(memfd(content), 0, target, 0, LARGE) == LARGE
    assert os.pread(target, LARGE, 0) == content


@pytest.mark.parametrize("way", WAYS)
def test_large_copy_is_made_in_parts_between_which_signals_are_seen(
    way: Way, memfd: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "UNINTERRUPTED", 1000)
    content = pattern(3500)
    source, target = memfd(content), memfd(b"")

    assert way(source, 0, target, 5, 3000) == 3000
    assert way(source, 3000, target, 3005, 3000) == 500
    assert os.pread(target, 4000, 5) == content


def test_splice_whose_target_refuses_it_falls_back_with_nothing_lost(
    file: Callable[[bytes], int], memfd: Callable[[bytes], int], tmp_path: Path
) -> None:
    """splice(2) fills the pipe before it finds that an O_APPEND file can't be spliced to."""
    content = pattern(LARGE)
    target = os.open(tmp_path / "appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    moved = FdCopier().copy(memfd(content), 0, target, 0, LARGE)

    os.close(target)
    assert moved == LARGE
    assert (tmp_path / "appended").read_bytes() == content
    assert bytes_in_pipe() == 0


def test_copy_to_a_full_device_reports_no_space(memfd: Callable[[bytes], int]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        FdCopier().copy(memfd(pattern(LARGE)), 0, full, 0, LARGE)

    os.close(full)
    assert bytes_in_pipe() == 0


def test_copy_from_a_directory_reports_what_it_is(
    memfd: Callable[[bytes], int], tmp_path: Path
) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)

    with pytest.raises(IsADirectoryError):
        FdCopier().copy(directory, 0, memfd(b""), 0, SPLICE_FROM)

    os.close(directory)


def test_pipe_of_a_thread_goes_with_the_thread(memfd: Callable[[bytes], int]) -> None:
    src, dst = memfd(pattern(LARGE)), memfd(bytes(LARGE))
    pipes: list[tuple[int, int]] = []

    def copy() -> None:
        FdCopier().copy(src, 0, dst, 0, LARGE)
        pipe = transfer._scratches.own.pipe
        assert pipe is not None
        pipes.append(pipe)

    thread = threading.Thread(target=copy)
    before = len(os.listdir("/proc/self/fd"))
    thread.start()
    thread.join()

    assert pipes
    assert len(os.listdir("/proc/self/fd")) == before
