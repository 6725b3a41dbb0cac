"""Ranges from a page to 2 MiB + 4 KiB, converted whole, in part and with holes in between.

What Linux' private_mem_conversions_test checks, with pyvmm's own converter in the middle.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import partial

from vmm.core.ranges import PAGE_SIZE, Range
from vmm.selftest.case import Cell, Failed, Skipped, case, expect
from vmm.selftest.rig import RAM_GPA, Rig

LARGE = (2 << 20) // PAGE_SIZE
CHUNK = LARGE + 1
RANGES = ((0, 1), (0, LARGE), (1, 1), (1, LARGE), (LARGE, 1))
"""(first page, pages): a page, 2 MiB, both from a page on, and the page past 2 MiB."""
INITIAL, BEFORE, INSIDE, HOST, AFTER = (0x0101_0101_0101_0101 * n for n in (0xCC, 1, 2, 3, 4))
VCPUS = 4


def convert_ranges(rig: Rig, base: int, cpu: int = 0) -> None:
    """The whole pattern on CHUNK shared pages from page `base`, by one vCPU."""
    rig.fill(base, CHUNK, INITIAL, cpu)
    expect("host's view at the start", rig.host_holds(base, CHUNK, INITIAL), True)
    for first, count in RANGES:
        what = f"pages {first} to {first + count - 1}"
        start = base + first
        rig.fill(start, count, BEFORE, cpu)
        expect(f"answer to unshare of {what}", rig.unshare(start, count, cpu), 0)
        expect(f"{what} are zeros", rig.holds(start, count, 0, cpu), True)
        rig.fill(start, count, INSIDE, cpu)
        _surroundings(rig, base, first, count, cpu)
        _odd_pages_to_shared(rig, start, count, cpu)
        expect(f"answer to share of {what}", rig.share(start, count, cpu), 0)
        rig.fill(start, count, HOST, cpu)
        expect(f"host's view of {what}", rig.host_holds(start, count, HOST), True)
        rig.host_fill(start, count, AFTER)
        expect(f"guest's view of {what}", rig.holds(start, count, AFTER, cpu), True)
        rig.fill(start, count, INITIAL, cpu)


def _surroundings(rig: Rig, base: int, first: int, count: int, cpu: int) -> None:
    """What lies around the private range is shared as before."""
    for start, pages in ((0, first), (first + count, CHUNK - first - count)):
        if pages > 0:
            seen = rig.holds(base + start, pages, INITIAL, cpu)
            expect(f"the {pages} pages from {start} beside the private range", seen, True)
            expect("host's view of them", rig.host_holds(base + start, pages, INITIAL), True)


def _odd_pages_to_shared(rig: Rig, start: int, count: int, cpu: int) -> None:
    """Holes in a private range: a few odd pages become shared, the even ones stay."""
    for page in [start + offset for offset in range(count) if offset % 2][:4]:
        expect(f"answer to share of page {page}", rig.share(page, 1, cpu), 0)
        rig.host_fill(page, 1, HOST)
        expect(f"shared page {page} in a private range", rig.holds(page, 1, HOST, cpu), True)
        expect(f"private page {page - 1} beside it", rig.holds(page - 1, 1, INSIDE, cpu), True)


@case("ranges of 4 KiB, 2 MiB and past it convert there and back, with holes in between")
def one_vcpu(cell: Cell) -> None:
    rig = cell.rig(pages=CHUNK, private=())
    convert_ranges(rig, 0)


@case("the same from 4 vCPUs at once, each in a part of its own")
def several_vcpus(cell: Cell) -> None:
    rig = cell.rig(pages=CHUNK * VCPUS, private=(), vcpus=VCPUS)
    together([partial(convert_ranges, rig, CHUNK * n, n) for n in range(VCPUS)])


@case("the same in each of two memslots; a range over the hole between them is refused whole")
def several_memslots(cell: Cell) -> None:
    hole = RAM_GPA + CHUNK * PAGE_SIZE
    ram = [Range(RAM_GPA, hole - RAM_GPA), Range(hole + PAGE_SIZE, CHUNK * PAGE_SIZE)]
    rig = cell.rig(ram=ram, private=())
    for base in (0, CHUNK + 1):
        convert_ranges(rig, base)
    expect("answer to unshare over the hole", rig.unshare(CHUNK - 1, 3), -errno.EINVAL)
    expect("pages on both sides of it", (rig.read(CHUNK - 1), rig.read(CHUNK + 1)), (INITIAL,) * 2)


@case("pages punched out of the private side come back as zeros, to their last word")
def punched_private_pages_are_zeros(cell: Cell) -> None:
    for precise in (False, True):
        rig = cell.rig(pages=CHUNK)
        if rig.memory.private is rig.memory.shared:
            raise Skipped("one backing stands behind both sides")
        for first, count in RANGES:
            rig.private.punch(RAM_GPA, CHUNK * PAGE_SIZE)
            start, filled = (first, count) if precise else (0, CHUNK)
            rig.fill(start, filled, INITIAL)
            rig.private.punch(rig.gpa(first), count * PAGE_SIZE)
            expect(f"pages from {first} after the hole", rig.holds(first, count, 0), True)
            if not precise and first:
                expect("page before the hole", rig.holds(first - 1, 1, INITIAL), True)


def together(calls: list[Callable[[], None]]) -> None:
    """Run the calls on a thread each; the first failure is raised when all have ended."""
    failures: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        if thread.is_alive():
            raise Failed("a vCPU did not come to an end within 60 s")
    if failures:
        raise failures[0]
