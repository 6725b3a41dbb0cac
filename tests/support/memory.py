"""Builders for guest memory in tests: layouts, filled backings, backings that fail or wait."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvm_bindings import KvmError
from vmm.core.ranges import NOWHERE, PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory

HOLE_START, HOLE_END = 0xC000_0000, 0x1_0000_0000
"""RAM stops below the last GiB under 4 GiB and goes on above it, as in a PC."""

SPLIT_RAM = (Range(0, HOLE_START), Range(HOLE_END, 64 * PAGE_SIZE))
SMALL_RAM = (Range(0, 64 * PAGE_SIZE),)

_RAMP = bytes(range(1, 256))


def page(number: int) -> int:
    """The GPA of a page."""
    return number * PAGE_SIZE


def pages(first: int, count: int) -> Range:
    """`count` pages from page number `first`."""
    return Range(page(first), page(count))


def pattern(size: int, seed: int = 0) -> bytes:
    """`size` bytes that are never zero; 255 is odd, so that each page starts with another one."""
    start = seed % 255
    return (_RAMP * (2 + size // 255))[start : start + size]


@contextmanager
def guest_memory(
    *private: Range,
    ram: tuple[Range, ...] = SMALL_RAM,
    shared: MemfdBacking | None = None,
    private_backing: MemfdBacking | None = None,
    common: Range = NOWHERE,
) -> Iterator[GuestMemory]:
    """GuestMemory over two memfds, `private` ranges private, the rest shared."""
    size = ram[-1].end
    memory = GuestMemory(
        ram,
        shared or MemfdBacking(size),
        private_backing or MemfdBacking(size),
        private,
        common,
    )
    try:
        yield memory
    finally:
        memory.close()


def data_pages(fd: int) -> set[int]:
    """Numbers of the pages that a memfd holds memory for, by SEEK_DATA and SEEK_HOLE."""
    found: set[int] = set()
    position = 0
    while True:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return found
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        found.update(range(start // PAGE_SIZE, position // PAGE_SIZE))


class GatedBacking(MemfdBacking):
    """A memfd whose host accesses stop half way until the test opens the gate."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.arrivals = threading.Semaphore(0)
        """Released by each access that has come as far as the gate."""
        self.gate = threading.Event()

    def pread(self, size: int, offset: int) -> bytes:
        self.wait()
        return super().pread(size, offset)

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        self.wait()
        return super().transfer_in(src_fd, src_offset, offset, size)

    def read_many(self, pieces: list[int]) -> bytes | bytearray:
        self.wait()
        return super().read_many(pieces)

    def await_arrivals(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.arrivals.acquire(timeout=30), "no access came as far as the gate"

    def wait(self) -> None:
        self.arrivals.release()
        if not self.gate.wait(30):
            raise AssertionError("nobody opened the gate")


class Background:
    """Runs one call on a thread; `result` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._value: object = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> object:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the call does not return"
        if self._error is not None:
            raise self._error
        return self._value


class BrokenPunch(MemfdBacking):
    """A memfd that can't give pages back."""

    def __init__(self, size: int, error: BaseException | None = None) -> None:
        super().__init__(size)
        self.error = error or KvmError("fallocate", errno.ENOMEM, "PUNCH_HOLE")

    def punch(self, offset: int, size: int) -> None:
        raise self.error


def told_when_waiting(memory: GuestMemory) -> threading.Event:
    """An event set once a conversion, or an unmap, waits for the host's accesses to end."""
    waiting = threading.Event()
    wait_for = memory._drained.wait_for

    def told(predicate: object, timeout: float | None = None) -> bool:
        waiting.set()
        return wait_for(predicate, timeout)  # type: ignore[arg-type]

    memory._drained.wait_for = told  # type: ignore[method-assign,assignment]
    return waiting
