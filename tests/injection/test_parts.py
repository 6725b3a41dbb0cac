"""Parts by themselves, with calls replaced in Python: what a whole run can't be made to show."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings import KvmError, fdops, sandbox
from tests.support.memory import guest_memory, page, pages, pattern
from tests.support.protected import protected_memory
from vmm.boot import isolate
from vmm.cli.main import _explain
from vmm.control.memory_file.guest_file import GuestFile
from vmm.core.errors import in_words
from vmm.core.event_loop import EventLoop, drain
from vmm.core.output import write_all as write_out
from vmm.core.unix_listener import UnixListener
from vmm.devices.host_check import host_check
from vmm.memory.backing import write_all
from vmm.memory.backings.guest_memfd import MappedGuestMemfdBacking
from vmm.memory.backings.memfd import MemfdBacking
from vmm.sandbox.device import enter_device
from vmm.sandbox.worker import enter_worker

MOST_SIGNALS = (1 << 64) - 2
"""What an eventfd holds before it is full."""
Patch = pytest.MonkeyPatch


def failing(error: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(error, os.strerror(error))

    return fail


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of 64 KiB of pattern."""
    path = tmp_path / "file"
    path.write_bytes(pattern(1 << 16))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


# -- the device loop -------------------------------------------------------------------------


def test_loop_whose_eventfd_is_full_is_stopped_all_the_same() -> None:
    """Who ends a run, perhaps because of an error, must not meet another one on the way."""
    loop = EventLoop()
    os.eventfd_write(loop._wake, MOST_SIGNALS)

    loop.stop()
    loop.set_timer(0.0, lambda: None)

    loop.run()
    loop.close()


def test_drain_that_is_interrupted_drains(eventfd: int, monkeypatch: Patch) -> None:
    read, interruptions = os.eventfd_read, [InterruptedError(errno.EINTR, ""), None]

    def interrupted(fd: int) -> int:
        error = interruptions.pop(0)
        if error is not None:
            raise error
        return read(fd)

    monkeypatch.setattr(os, "eventfd_read", interrupted)
    os.eventfd_write(eventfd, 3)

    drain(eventfd)

    with pytest.raises(BlockingIOError):
        read(eventfd)


def test_watch_that_epoll_refuses_half_can_be_tried_again(eventfd: int, monkeypatch: Patch) -> None:
    """What is served while the loop is held is in two epolls."""
    loop = EventLoop()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_unheld_epoll", Refusing(errno.ENOSPC))
        with pytest.raises(OSError):
            loop.add(eventfd, loop.stop, unheld=True)

    loop.add(eventfd, loop.stop, unheld=True)

    os.eventfd_write(eventfd, 1)
    loop.run()
    loop.close()


def test_watch_in_time_raises_what_time_does_not_mend(file: int) -> None:
    loop = EventLoop()

    with pytest.raises(PermissionError):
        loop.watch_in_time(file, loop.stop, readable=True)

    loop.close()


class Refusing:
    """An epoll that has no room."""

    def __init__(self, error: int) -> None:
        self.register = failing(error)


# -- the sandbox ---------------------------------------------------------------------------------


@pytest.mark.parametrize("enter", [enter_worker, enter_device])
def test_process_that_the_kernel_keeps_out_of_its_sandbox_does_no_work(
    enter: Callable[[], object], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(sandbox, "no_new_privileges", lambda: None)
    monkeypatch.setattr(sandbox, "landlock", refused(errno.ENOMEM))

    with pytest.raises(KvmError):
        enter()


@pytest.mark.parametrize("enter", [enter_worker, enter_device])
def test_process_works_without_a_sandbox_where_the_kernel_has_none(
    enter: Callable[[], object], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(sandbox, "no_new_privileges", lambda: None)
    monkeypatch.setattr(sandbox, "landlock", refused(errno.ENOSYS))

    assert enter() in (None, (False, 0))


def test_decompressor_that_is_kept_out_of_its_sandbox_says_what_needs_none(
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(sandbox, "no_new_privileges", refused(errno.EPERM))

    said = isolate._confined().decode()

    assert "can't enter its sandbox: " in said and "EPERM" in said and "(vmlinux)" in said


def refused(error: int) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise KvmError("landlock_restrict_self", error)

    return fail


# -- calls that move nothing, or less ----------------------------------------------------------


@pytest.mark.parametrize(
    "write", [lambda fd: write_all(fd, b"abc", 0), lambda fd: write_out(fd, b"abc")]
)
def test_write_that_moves_nothing_is_an_error_and_no_endless_loop(
    write: Callable[[int], None], file: int, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    monkeypatch.setattr(os, "write", lambda *_: 0)

    with pytest.raises(OSError) as caught:
        write(file)

    assert caught.value.errno == errno.EIO


def test_transfer_to_a_file_that_takes_nothing_is_an_error(file: int, monkeypatch: Patch) -> None:
    fd = os.memfd_create("readable")
    os.ftruncate(fd, 4096)
    backing = MappedGuestMemfdBacking(fd, 4096)
    monkeypatch.setattr(fdops, "pwrite_from_address", lambda *_: 0)

    with pytest.raises(OSError) as caught:
        backing.transfer_out(0, 4096, file, 0)

    assert caught.value.errno == errno.EIO
    backing.close()


def test_short_read_of_a_disk_is_not_its_end_for_a_protected_guest(
    file: int, monkeypatch: Patch
) -> None:
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read(fd, max(size // 2, 1), at))
    with protected_memory() as (memory, guest):
        moved = memory.shared._bounce_in(file, [100, page(3), 5000])  # type: ignore[attr-defined]
        monkeypatch.undo()

        assert moved == 5000
        assert guest.peek(5000, page(3)) == pattern(1 << 16)[100:5100]


def test_residency_that_the_kernel_does_not_tell_is_null_in_the_report(
    monkeypatch: Patch,
) -> None:
    with guest_memory() as memory:
        monkeypatch.setattr(memory.shared, "resident_bytes", failing(errno.ENOSYS))

        assert memory.accounted() == {"private_bytes": None, "shared_bytes": None}


# -- guest memory ------------------------------------------------------------------------------


class Breaking(MemfdBacking):
    """A memfd that can't be used from its second page on."""

    def preadv(self, buffers: Any, offset: int) -> None:
        self._check(offset)
        super().preadv(buffers, offset)

    def pwritev(self, buffers: Any, offset: int) -> None:
        self._check(offset)
        super().pwritev(buffers, offset)

    @staticmethod
    def _check(offset: int) -> None:
        if offset >= page(1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_memory_file_counts_what_was_moved_before_an_error() -> None:
    """A policy has each run asked for by itself; here two, of which the second fails."""
    with guest_memory(pages(2, 2), shared=Breaking(page(64))) as memory:
        file = GuestFile(memory)
        open_pieces = [pages(0, 1), pages(1, 1)]
        file._open_pieces = lambda area: open_pieces  # type: ignore[method-assign]

        written = file.write(memoryview(pattern(page(2))), 0, lambda *_: None)

        assert written == page(1)
        assert memory.pread(page(1), 0) == pattern(page(2))[: page(1)]
        assert (file.counts["writes"], file.counts["bytes_written"]) == (1, page(1))
        open_pieces[:] = [pages(1, 1)]
        with pytest.raises(OSError) as caught:
            file.write(memoryview(pattern(page(1))), page(1), lambda *_: None)
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("call", ["pread", "pwrite"])
def test_host_check_answers_what_the_host_refuses(call: str, monkeypatch: Patch) -> None:
    with guest_memory() as memory:
        data = b"".join(
            (gpa ^ 0x5041_594C_4F41_4421).to_bytes(8, "little") for gpa in range(0, 64, 8)
        )
        memory.pwrite(data, 0)
        monkeypatch.setattr(memory.shared, call, failing(errno.ENOMEM))

        assert host_check(memory, 0, 64) == -errno.ENOMEM


def test_memory_that_cannot_be_had_says_how_much_it_was(monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "memfd_create", failing(errno.ENOMEM))

    with pytest.raises(OSError, match="64 MiB of guest memory: Cannot allocate memory") as caught:
        MemfdBacking(64 << 20)

    assert caught.value.errno == errno.ENOMEM


# -- callers -----------------------------------------------------------------------------------


def test_caller_who_can_be_neither_taken_nor_turned_away_is_an_error(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """Who has no clock to try again later is told that nobody has come."""
    listener = UnixListener("--x=", str(tmp_path / "s"))
    for error in (errno.ENOMEM, errno.EMFILE):
        monkeypatch.setattr(socket.socket, "accept", failing(error))

        with pytest.raises(OSError) as caught:
            listener.accept()

        assert caught.value.errno == error
        assert listener.take() is None
    monkeypatch.setattr(socket.socket, "accept", failing(errno.ECONNABORTED))
    assert listener.accept() is None
    monkeypatch.undo()
    listener.close()


# -- sentences ---------------------------------------------------------------------------------


def test_thread_that_the_host_refuses_is_no_internal_error() -> None:
    status, sentence = _explain(RuntimeError("can't start new thread"))

    assert status == 3
    assert sentence.startswith("the host refused one more thread; raise `ulimit -u`")


def test_limit_that_cannot_be_looked_up_is_not_guessed(monkeypatch: Patch) -> None:
    """A module can't always be loaded any more at a run's end: only EMFILE says so by itself."""
    monkeypatch.setitem(sys.modules, "resource", None)

    assert in_words(OSError(errno.ENOMEM, "Cannot allocate memory")) == "Cannot allocate memory"
    assert in_words(OSError(errno.EMFILE, "Too many")).endswith("; raise `ulimit -n`")
