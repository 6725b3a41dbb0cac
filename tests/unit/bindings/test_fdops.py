"""System calls on backing fds: holes, mappings as numbers, errors as sentences, EINTR retried."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvm_bindings import KvmError, fdops

PAGE = 4096


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test")
    os.truncate(fd, 8 * PAGE)
    os.pwrite(fd, b"\x55" * 8 * PAGE, 0)
    yield fd
    os.close(fd)


@pytest.fixture
def mapping(memfd: int) -> Iterator[int]:
    address = fdops.map_shared(memfd, 8 * PAGE)
    yield address
    fdops.unmap(address, 8 * PAGE)


def test_punch_hole_gives_the_pages_back_and_keeps_the_size(memfd: int) -> None:
    fdops.punch_hole(memfd, PAGE, 2 * PAGE)

    assert os.fstat(memfd).st_size == 8 * PAGE
    assert os.fstat(memfd).st_blocks * 512 == fdops.cached_pages(memfd) * PAGE == 6 * PAGE
    assert os.pread(memfd, 4 * PAGE, 0) == b"\x55" * PAGE + bytes(2 * PAGE) + b"\x55" * PAGE


def test_mapping_shows_what_system_calls_move_into_it(memfd: int, mapping: int) -> None:
    source = os.memfd_create("source")
    os.pwrite(source, b"hello", 0)

    moved_in = fdops.pread_to_address(source, mapping + 100, 50, 0)
    moved_out = fdops.pwrite_from_address(source, mapping + 100, 5, 20)

    assert (moved_in, moved_out) == (5, 5)
    assert os.pread(memfd, 7, 99) == b"\x55hello\x55"
    assert os.pread(source, 5, 20) == b"hello"
    os.close(source)


def test_mapping_that_is_forgotten_shows_the_same_bytes_again(memfd: int, mapping: int) -> None:
    os.pwrite(memfd, b"stays", PAGE)
    assert read_by_system_call(mapping + PAGE) == b"stays"

    fdops.forget(mapping + PAGE, PAGE)

    assert read_by_system_call(mapping + PAGE) == b"stays"


def test_what_is_not_mapped_cannot_be_forgotten(mapping: int) -> None:
    with pytest.raises(KvmError, match=r"madvise\(address=0x1, .* failed: EINVAL"):
        fdops.forget(1, PAGE)


def read_by_system_call(address: int) -> bytes:
    sink = os.memfd_create("sink")
    fdops.pwrite_from_address(sink, address, 5, 0)
    found = os.pread(sink, 5, 0)
    os.close(sink)
    return found


def test_protected_mapping_is_efault_for_a_system_call_not_a_signal(
    memfd: int, mapping: int
) -> None:
    fdops.protect(mapping, 8 * PAGE, fdops.PROT_NONE)

    with pytest.raises(KvmError) as raised:
        fdops.pread_to_address(memfd, mapping, PAGE, 0)

    assert raised.value.errno == errno.EFAULT


@pytest.mark.parametrize(
    ("call", "operation", "number", "words"),
    [
        (lambda: fdops.map_shared(-1, PAGE), "mmap", errno.EBADF, "fd=-1, offset=0x0, size=0x1000"),
        (lambda: fdops.unmap(1, PAGE), "munmap", errno.EINVAL, "address=0x1, size=0x1000"),
        (lambda: fdops.protect(1, PAGE, 0), "mprotect", errno.EINVAL, "address=0x1"),
        (
            lambda: fdops.punch_hole(-1, 0, PAGE),
            "fallocate",
            errno.EBADF,
            "PUNCH_HOLE, offset=0x0, size=0x1000",
        ),
        (lambda: fdops.punch_hole(0, 0, 0), "fallocate", errno.EINVAL, "size=0x0"),
        (lambda: fdops.zero_range(-1, 0, PAGE), "fallocate", errno.EBADF, "ZERO_RANGE"),
        (lambda: fdops.pread_to_address(-1, 0, 1, 7), "pread", errno.EBADF, "offset=0x7"),
        (lambda: fdops.pwrite_from_address(-1, 0, 1, 7), "pwrite", errno.EBADF, "offset=0x7"),
        (lambda: fdops.cached_pages(-1), "cachestat", errno.EBADF, "fd=-1"),
    ],
)
def test_failed_call_names_operation_arguments_and_errno(
    call: Callable[[], Any], operation: str, number: int, words: str
) -> None:
    with pytest.raises(KvmError) as raised:
        call()

    assert raised.value.operation == operation
    assert raised.value.errno == number
    assert words in str(raised.value)
    assert errno.errorcode[number] in str(raised.value)


class InterruptedOnce:
    """Stands in for the extension: each call is interrupted once, then succeeds."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: int) -> int:
            self.calls.append(name)
            return -errno.EINTR if self.calls.count(name) == 1 else 0

        return call


@pytest.mark.parametrize(
    "call",
    [
        lambda: fdops.punch_hole(0, 0, PAGE),
        lambda: fdops.zero_range(0, 0, PAGE),
        lambda: fdops.pread_to_address(0, 0, PAGE, 0),
        lambda: fdops.pwrite_from_address(0, 0, PAGE, 0),
    ],
)
def test_call_interrupted_by_a_signal_is_repeated(
    call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = InterruptedOnce()
    monkeypatch.setattr(fdops, "lib", library)

    call()

    assert len(library.calls) == 2
