"""(b) Sharing and unsharing: the transaction against the bare system calls, alone and crowded; and
what it costs, in time and memory, where the content of the pages comes along."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from kvm_bindings import System, fdops
from vmm.arch import architecture
from vmm.bench.accessors import size_name
from vmm.bench.series import Series, interleaved
from vmm.conversion.matrix import UNTOLD
from vmm.core.errors import HostError
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.selftest.entries import combinations
from vmm.selftest.platform import KvmPlatform
from vmm.selftest.rig import Rig

SIZES = (4 << 10, 64 << 10, 2 << 20, 64 << 20)
QUICK_SIZES = (4 << 10, 2 << 20, 64 << 20)
THREADS = 4


def measure(system: System, rounds: int, sizes: tuple[int, ...]) -> Iterator[Series]:
    """Every scheme with every backing that this host has, where it is the host that converts."""
    arch = architecture()
    platform = KvmPlatform(arch, system)
    held: list[Series] = []
    for combination in combinations([name for name in arch.schemes if name not in UNTOLD]):
        pages = max(sizes) // PAGE_SIZE
        try:
            rig = Rig(platform, combination, pages=pages * THREADS, vcpus=0)
        except (HostError, OSError, ValueError):
            continue
        with rig:
            for size in sizes:
                case = f"{combination} {size_name(size)}"
                yield from _one_size(rig, case, size, rounds)
                peak, after = memory_held(rig, rig.gpa(0), size // PAGE_SIZE)
                for subject, held_bytes in (("at the peak", peak), ("afterwards", after)):
                    kib = [held_bytes / 1024]
                    held.append(Series("conversions-memory", case, subject, "KiB", kib))
    yield from held


def _one_size(rig: Rig, case: str, size: int, rounds: int) -> Iterator[Series]:
    pages = size // PAGE_SIZE
    crowd = [rig.gpa(pages * number) for number in range(THREADS)]
    subjects: dict[str, Callable[[], float]] = {
        "share and unshare": lambda: _pair(rig, crowd[:1], pages),
        f"the same, {THREADS} threads": lambda: _pair(rig, crowd, pages),
    }
    if rig.scheme.name == "cbit":
        subjects["bare holes"] = lambda: _bare(rig, crowd[0], size)
    subjects["bare, content kept"] = lambda: _with_content(rig, crowd[0], pages)
    yield from interleaved("conversions", case, "us", subjects, rounds)


def _pair(rig: Rig, gpas: list[int], pages: int) -> float:
    """Microseconds for a share and an unshare of touched pages, for each of the threads."""
    repeats = max(1, 64 // pages)
    data = bytes(pages * PAGE_SIZE)
    failures: list[int] = []

    def convert(gpa: int) -> None:
        for kind in (Kind.SHARE, Kind.UNSHARE) * repeats:
            answer = rig.converter.convert(ConversionRequest(kind, gpa, pages, 0, "bench"))
            if answer:
                failures.append(answer)
            elif kind is Kind.SHARE:
                rig.memory.pwrite(data, gpa | rig.scheme.shared_alias)

    # The writes between the calls are part of what is measured, and of the bare variant too.
    started = time.perf_counter_ns()
    if len(gpas) == 1:
        convert(gpas[0])
    else:
        threads = [threading.Thread(target=convert, args=(gpa,)) for gpa in gpas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elapsed = time.perf_counter_ns() - started
    if failures:
        raise HostError(f"a conversion was refused: errno {-failures[0]}")
    return elapsed / repeats / len(gpas) / 1000


def _with_content(rig: Rig, gpa: int, pages: int) -> float:
    """Microseconds until private pages are shared with what was in them, by system calls alone
    (the transaction discards what was private). Where there are two sides, the guest copies first,
    as Linux does, here by one write, and the private side is punched; in place it is one ioctl."""
    repeats = max(1, 16 // pages)
    taken = 0
    data = bytes(pages * PAGE_SIZE)
    for _ in range(repeats):
        _fill_private(rig, gpa, len(data))
        started = time.perf_counter_ns()
        if not rig.memory.in_place:
            rig.memory.shared.pwrite(data, gpa)
        rig.scheme.apply(Range(gpa, len(data)), Kind.SHARE)
        if not rig.memory.in_place:
            rig.private.punch(gpa, len(data))
        taken += time.perf_counter_ns() - started
        _take_back(rig, gpa, len(data))
    return taken / repeats / 1000


def memory_held(rig: Rig, gpa: int, pages: int) -> tuple[int, int]:
    """Bytes that the kernel holds for such a range when most is there, and when it is shared."""
    size = pages * PAGE_SIZE

    def held() -> int:
        sides = (rig.private,) if rig.memory.in_place else (rig.private, rig.memory.shared)
        return sum(side.resident_bytes(gpa, size) for side in sides)

    _fill_private(rig, gpa, size)
    if not rig.memory.in_place:
        rig.memory.shared.pwrite(bytes(size), gpa)
    peak = held()
    rig.scheme.apply(Range(gpa, size), Kind.SHARE)
    if not rig.memory.in_place:
        rig.private.punch(gpa, size)
    after = held()
    _take_back(rig, gpa, size)
    return peak, after


def _take_back(rig: Rig, gpa: int, size: int) -> None:
    """Private again, and empty."""
    rig.scheme.apply(Range(gpa, size), Kind.UNSHARE)
    rig.memory.shared.punch(gpa, size)


def _fill_private(rig: Rig, gpa: int, size: int) -> None:
    """Pages come to be, as by the guest's own writes."""
    fdops.fallocate(rig.private.fd, fdops.FALLOC_FL_KEEP_SIZE, gpa, size)


def _bare(rig: Rig, gpa: int, size: int) -> float:
    """The system calls that a pair comes down to: two holes, and the write in between."""
    shared, private = rig.memory.shared, rig.private
    repeats = max(1, 64 * PAGE_SIZE // size)
    data = bytes(size)
    started = time.perf_counter_ns()
    for _ in range(repeats):
        private.punch(gpa, size)
        shared.pwrite(data, gpa)
        shared.punch(gpa, size)
    return (time.perf_counter_ns() - started) / repeats / 1000
