"""Pages that were given up are given back to the host, and both sides add up."""

from __future__ import annotations

from vmm.core.ranges import PAGE_SIZE
from vmm.selftest.case import Cell, Skipped, case, expect
from vmm.selftest.rig import Rig

PAGES = 64
WORD = 0x4444_7265_7369_6400


def resident(rig: Rig) -> tuple[int, int]:
    """Pages that the host's kernel holds for the private and for the shared side."""
    found = rig.memory.residency()
    return found.private_bytes // PAGE_SIZE, found.shared_bytes // PAGE_SIZE


def require_page_granule(rig: Rig) -> None:
    if rig.private.traits.granule != PAGE_SIZE:
        raise Skipped(f"{rig.private.name} gives back {rig.private.traits.granule} bytes at a time")


@case("what a guest touches is resident, on the side that it touched, and nothing else")
def touched_pages_are_resident(cell: Cell) -> None:
    rig = cell.rig(pages=PAGES)
    require_page_granule(rig)
    expect("pages resident at the start (private, shared)", resident(rig), (0, 0))
    rig.fill(0, 10, WORD)
    expect("after 10 private pages", resident(rig), (10, 0))
    rig.share(32, 8)
    rig.fill(32, 5, WORD)
    expect("after 5 shared pages", resident(rig), (10, 5))


@case("a share gives the private pages back")
def share_frees_private_side(cell: Cell) -> None:
    rig = cell.rig(pages=PAGES)
    require_page_granule(rig)
    rig.fill(0, PAGES, WORD)
    rig.share(0, 20)
    expect("pages resident (private, shared)", resident(rig), (PAGES - 20, 0))


@case("an unshare gives the shared pages back")
def unshare_frees_shared_side(cell: Cell) -> None:
    rig = cell.rig(pages=PAGES, private=())
    require_page_granule(rig)
    rig.fill(0, PAGES, WORD)
    rig.unshare(0, 20)
    expect("pages resident (private, shared)", resident(rig), (0, PAGES - 20))


@case("converting everything there and back leaves nothing resident")
def round_trip_leaves_nothing(cell: Cell) -> None:
    rig = cell.rig(pages=PAGES)
    require_page_granule(rig)
    rig.fill(0, PAGES, WORD)
    rig.share(0, PAGES)
    rig.host_fill(0, PAGES, WORD)
    rig.unshare(0, PAGES)
    expect("pages resident (private, shared)", resident(rig), (0, 0))
    counts = rig.converter.accounting
    size = PAGES * PAGE_SIZE
    expect("bytes counted (share, unshare)", (counts.share.bytes, counts.unshare.bytes),
           (size, size))  # fmt: skip
