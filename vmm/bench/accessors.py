"""(a) Reading and writing guest memory, and moving a file's bytes into it, every way."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from kvm_bindings import System, Vm, fdops, floors
from vmm.bench.series import Series, interleaved
from vmm.conversion.making import make_backing
from vmm.conversion.scheme import set_slot
from vmm.core.ranges import Range
from vmm.memory.backing import Backing
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.engines import make_engine
from vmm.memory.guest_memory import GuestMemory

SPAN = 64 << 20
SIZES = (64, 512, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 1 << 20, 16 << 20, 64 << 20)
QUICK_SIZES = (64, 4 << 10, 64 << 10, 1 << 20, 64 << 20)
BATCH = 32


def size_name(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def _count(size: int) -> int:
    """How often, for a sample of a millisecond or so."""
    return max(1, min(512, (4 << 20) // size))


def timed(call: Callable[[int], object], size: int) -> Callable[[], float]:
    """A sample: microseconds that one call takes, offsets walking over the span."""
    count = _count(size)
    offsets = [i * size % SPAN for i in range(count)]

    def sample() -> float:
        started = time.perf_counter_ns()
        for offset in offsets:
            call(offset)
        return (time.perf_counter_ns() - started) / count / 1000

    return sample


def measure(system: System | None, rounds: int, sizes: tuple[int, ...]) -> Iterator[Series]:
    """Reads and writes on each backing that there is, then transfers from a file."""
    for name in ("memfd", "guest_memfd-mmap"):
        with _memory(system, name) as (memory, vm_fd):
            if memory is None:
                continue
            for size in sizes:
                for write in (False, True):
                    verb = "write" if write else "read"
                    case = f"{verb} {size_name(size)}, {name}"
                    subjects = _ways(memory, vm_fd, size, write)
                    yield from interleaved("accessors", case, "us", subjects, rounds)
    for name, words in (("memfd", ""), ("guest_memfd-mmap", ", guest_memfd-mmap")):
        with _memory(system, name) as (memory, vm_fd), _file() as file:
            if memory is None or memory.shared.access != "pread/pwrite":
                continue  # a guest_memfd has no transfers of its own up to Linux 7.3
            for size in sizes:
                for write in (False, True):
                    verb = "memory to file" if write else "file to memory"
                    subjects = _transfers(memory, vm_fd, file, size, write)
                    case = f"{verb} {size_name(size)}{words}"
                    yield from interleaved("transfers", case, "us", subjects, rounds)


@contextmanager
def _memory(
    system: System | None, backing: str
) -> Iterator[tuple[GuestMemory, int] | tuple[None, int]]:
    """Shared guest memory of SPAN bytes, every page there; None where the host lacks it. With it
    the fd of a VM that has it as RAM from 0 on, where that can be read and written, else -1."""
    with ExitStack() as opened:
        side: Backing
        vm = None
        try:
            if system is not None:
                vm = opened.enter_context(system.create_vm())
            if backing == "memfd":
                side = MemfdBacking(SPAN)
            elif vm is not None:
                side = make_backing(vm, backing, SPAN)
            else:
                yield None, -1
                return
        except OSError:
            yield None, -1
            return
        memory = GuestMemory([Range(0, SPAN)], side)
        opened.callback(memory.close)
        for offset in range(0, SPAN, 1 << 20):
            memory.pwrite(b"\x5a" * (1 << 20), offset)
        yield memory, -1 if vm is None else _vm_io(vm, side)


def _vm_io(vm: Vm, side: Backing) -> int:
    try:
        set_slot(vm, 0, 0, Range(0, SPAN), side)
        os.pread(vm.fd, 1, 0)
    except OSError:
        return -1
    return vm.fd


@contextmanager
def _file() -> Iterator[int]:
    """A file of SPAN bytes on disk, all of it in the page cache."""
    with tempfile.TemporaryFile() as file:
        for _ in range(SPAN >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        yield file.fileno()


def _ways(
    memory: GuestMemory, vm_fd: int, size: int, write: bool
) -> dict[str, Callable[[], float]]:
    side = memory.shared
    count = _count(size)
    scratch = os.memfd_create("scratch", os.MFD_CLOEXEC)
    os.ftruncate(scratch, size)
    os.pwrite(scratch, b"\x5a" * size, 0)
    buffer = fdops.map_shared(scratch, size)
    os.close(scratch)
    ways: dict[str, Callable[[], float]] = {}
    if side.access == "pread/pwrite":
        bare = floors.pwrite_ns if write else floors.pread_ns
        ways["C pread/pwrite"] = lambda: bare(side.fd, buffer, size, SPAN, count) / 1000
        if vm_fd >= 0:
            ways["C VM fd"] = lambda: bare(vm_fd, buffer, size, SPAN, count) / 1000
    if write:
        ways["C memcpy"] = lambda: (
            floors.memcpy_ns(side.hva, SPAN, buffer, size, size, count) / 1000
        )
        data = b"\x5a" * size
        ways["GuestMemory"] = timed(lambda offset: memory.pwrite(data, offset), size)
        if side.is_guest_memfd and side.access == "pread/pwrite":
            # What there is where a guest_memfd can't be written.
            mem, hva = _own_memory(), side.hva
            ways["/proc/self/mem"] = timed(lambda offset: os.pwrite(mem, data, hva + offset), size)
    else:
        ways["C memcpy"] = lambda: (
            floors.memcpy_ns(buffer, size, side.hva, SPAN, size, count) / 1000
        )
        ways["GuestMemory"] = timed(lambda offset: memory.pread(size, offset), size)
        if side.is_guest_memfd and side.access == "pread/pwrite":
            mem, hva = _own_memory(), side.hva
            ways["/proc/self/mem"] = timed(lambda offset: os.pread(mem, size, hva + offset), size)
    if size <= 4096:
        ways[f"GuestMemory, batch of {BATCH}"] = _batched(memory, size, write)
    return ways


@functools.cache
def _own_memory() -> int:
    return os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)


def _batched(memory: GuestMemory, size: int, write: bool) -> Callable[[], float]:
    pieces: list[int] = []
    for number in range(BATCH):
        pieces += (number * 8192, size)
    data = b"\x5a" * (size * BATCH)
    one: Callable[[int], object] = lambda _: memory.read_many(pieces)  # noqa: E731
    if write:
        one = lambda _: memory.write_many(pieces, data)  # noqa: E731
    sample = timed(one, size * BATCH)
    return lambda: sample() / BATCH


def _transfers(
    memory: GuestMemory, vm_fd: int, file: int, size: int, write: bool
) -> dict[str, Callable[[], float]]:
    side, count = memory.shared, _count(size)
    ways: dict[str, Callable[[], float]] = {}
    for name in ("pread", "fd2fd", *(("vmfd",) if vm_fd >= 0 else ()), "hva", "mmap"):
        seen = memory.through(make_engine(name, side, vm_fd))
        if write:
            ways[name] = timed(lambda at, seen=seen: seen.transfer_out(at, size, file, at), size)  # type: ignore[misc]
        else:
            ways[name] = timed(lambda at, seen=seen: seen.transfer_in(file, at, at, size), size)  # type: ignore[misc]
    if not write:
        pipe = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 1 << 20)
        ways["C pread into a mapping"] = lambda: (
            floors.pread_mapped_ns(file, side.hva, size, SPAN, count) / 1000
        )
        ways["C splice"] = lambda: floors.splice_ns(file, side.fd, size, SPAN, count, pipe) / 1000
    return ways
