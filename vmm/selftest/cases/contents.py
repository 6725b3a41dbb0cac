"""Whose bytes are seen where: page identity, and what a conversion leaves of a page's content."""

from __future__ import annotations

from vmm.arch.guest_cpu import WORD
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.guest_memory import PageState
from vmm.selftest.case import Cell, Failed, Skipped, case, expect
from vmm.selftest.rig import Rig

GUEST, HOST, OTHER = 0x1111_6775_6573_7400, 0x2222_686F_7374_0000, 0x3333_6F74_6865_7200
"""Poison: every page gets its own number added."""
ZERO = 0


def raw_shared(rig: Rig, page: int) -> int:
    """The first word of the shared side, whatever state the page is in: what a broken monitor
    would hand out."""
    data = rig.memory.shared.pread(WORD, rig.gpa(page))
    return int.from_bytes(data, "little")


def require_two_sides(rig: Rig) -> None:
    if rig.memory.private is rig.memory.shared:
        raise Skipped("one backing stands behind both sides")


@case("a guest's private word is not in the shared side")
def private_word_stays_private(cell: Cell) -> None:
    rig = cell.rig()
    require_two_sides(rig)
    rig.fill(0, 4, GUEST)
    for page in range(4):
        expect(f"shared side of page {page}", raw_shared(rig, page), ZERO)
    expect("guest's own view", rig.holds(0, 4, GUEST), True)


@case("a host access to a private page is refused, and moves nothing")
def host_access_to_private_refused(cell: Cell) -> None:
    rig = cell.rig()
    rig.share(0, 1)
    rig.write(1, GUEST)
    for first, count in ((1, 1), (0, 2), (1, 3)):
        try:
            rig.host_fill(first, count, HOST)
        except PrivateAccess:
            continue
        raise Failed(f"a host write to pages {first} to {first + count - 1} went through")
    expect("private word", rig.read(1), GUEST)
    expect("shared page beside it", rig.read(0), ZERO)


@case("a word shared by the guest is seen by the host, and the other way round")
def shared_words_are_seen(cell: Cell) -> None:
    rig = cell.rig()
    expect("answer to share", rig.share(2, 3), 0)
    rig.fill(2, 3, GUEST)
    expect("host's view of the guest's words", rig.host_holds(2, 3, GUEST), True)
    rig.host_fill(2, 3, HOST)
    expect("guest's view of the host's words", rig.holds(2, 3, HOST), True)


@case("every page is itself: no two pages share memory, whatever their states")
def pages_are_distinct(cell: Cell) -> None:
    rig = cell.rig(pages=64)
    for page in range(0, 64, 2):
        rig.share(page, 1)
    for page in range(64):
        rig.write(page, GUEST + page)
    for page in range(64):
        expect(f"word of page {page}", rig.read(page), GUEST + page)
        if page % 2 == 0:
            expect(f"host's word of page {page}", rig.host_read(page), GUEST + page)


@case("both aliases of a page are two pages, and a write at one is never seen at the other")
def aliases_are_two_pages(cell: Cell) -> None:
    rig = cell.rig()
    if not rig.has_aliases:
        raise Skipped("this scheme has one address for both sides")
    cpu = rig.guests[0]
    for page in range(4):
        cpu.write(rig.alias(page, private=True), GUEST + page)
        expect(f"plain alias of page {page}", cpu.read(rig.alias(page, private=False)), ZERO)
        cpu.write(rig.alias(page, private=False), OTHER + page)
        expect(f"C-bit alias of page {page}", cpu.read(rig.alias(page, private=True)), GUEST + page)
        expect(f"shared side of page {page}", raw_shared(rig, page), OTHER + page)


@case("what a guest writes by the plain alias before it asks for a share is there afterwards")
def early_write_survives_share(cell: Cell) -> None:
    rig = cell.rig()
    if not rig.has_aliases:
        raise Skipped("this scheme has one address for both sides")
    rig.guests[0].write(rig.alias(0, private=False), GUEST)
    expect("answer to share", rig.share(0, 1), 0)
    expect("shared word", rig.read(0), GUEST)
    expect("host's word", rig.host_read(0), GUEST)


@case("a page that becomes shared shows nothing of what it held as a private one")
def share_shows_no_private_word(cell: Cell) -> None:
    rig = cell.rig()
    rig.fill(0, 4, GUEST)
    expect("answer to share", rig.share(0, 4), 0)
    expect("shared pages are zeros to the guest", rig.holds(0, 4, ZERO), True)
    expect("shared pages are zeros to the host", rig.host_holds(0, 4, ZERO), True)


@case("a page that becomes private shows nothing of what it held as a shared one")
def unshare_shows_no_shared_word(cell: Cell) -> None:
    rig = cell.rig(private=())
    rig.fill(0, 2, GUEST)
    rig.host_fill(2, 2, HOST)
    expect("answer to unshare", rig.unshare(0, 4), 0)
    expect("private pages are zeros", rig.holds(0, 4, ZERO), True)


@case("private words don't come back after a share and an unshare")
def private_words_do_not_come_back(cell: Cell) -> None:
    rig = cell.rig()
    rig.fill(0, 4, GUEST)
    rig.share(0, 4)
    expect("answer to unshare", rig.unshare(0, 4), 0)
    expect("private pages are zeros", rig.holds(0, 4, ZERO), True)


@case("shared words don't come back after an unshare and a share, to neither guest nor host")
def shared_words_do_not_come_back(cell: Cell) -> None:
    rig = cell.rig(private=())
    rig.fill(0, 2, GUEST)
    rig.host_fill(2, 2, HOST)
    rig.unshare(0, 4)
    expect("answer to share", rig.share(0, 4), 0)
    expect("shared pages are zeros to the guest", rig.holds(0, 4, ZERO), True)
    expect("shared pages are zeros to the host", rig.host_holds(0, 4, ZERO), True)


@case("a conversion leaves the pages beside it alone")
def neighbours_keep_their_words(cell: Cell) -> None:
    rig = cell.rig()
    for page in range(8):
        rig.write(page, GUEST + page)
    rig.share(3, 2)
    rig.host_fill(3, 2, HOST)
    rig.unshare(4, 1)
    for page in (0, 1, 2, 5, 6, 7):
        expect(f"word of page {page}", rig.read(page), GUEST + page)
    expect("page that stayed shared", rig.read(3), HOST)
    expect("page that went there and back", rig.read(4), ZERO)


@case("asking for the state that pages are in already is no error and changes nothing")
def settled_request_changes_nothing(cell: Cell) -> None:
    rig = cell.rig()
    rig.share(0, 2)
    rig.host_fill(0, 2, HOST)
    rig.write(2, GUEST)
    expect("answer to a second share", rig.share(0, 2), 0)
    expect("answer to a second unshare", rig.unshare(2, 1), 0)
    expect("shared words", rig.holds(0, 2, HOST), True)
    expect("private word", rig.read(2), GUEST)


@case("a share of pages in both states converts the private ones and keeps the shared ones' words")
def mixed_share_keeps_shared_words(cell: Cell) -> None:
    rig = cell.rig()
    rig.share(1, 1)
    rig.host_write(1, HOST)
    rig.write(0, GUEST)
    rig.write(2, GUEST)
    expect("answer to share", rig.share(0, 3), 0)
    expect("page that was shared", rig.read(1), HOST)
    expect("pages that were private", (rig.read(0), rig.read(2)), (ZERO, ZERO))
    expect("state", rig.state(0), PageState.SHARED)


@case("the last byte of a page belongs to it, and the next page starts after it")
def page_ends_where_it_ends(cell: Cell) -> None:
    rig = cell.rig()
    rig.share(1, 1)
    last = PAGE_SIZE - WORD
    cpu = rig.guests[0]
    cpu.write(rig.address(0) + last, GUEST)
    cpu.write(rig.address(1) + last, OTHER)
    cpu.write(rig.address(2), GUEST + 2)
    data = rig.memory.pread(PAGE_SIZE, rig.device_gpa(1))
    expect("host's last word of the shared page", int.from_bytes(data[last:], "little"), OTHER)
    expect("rest of the shared page", data[:last].strip(b"\0"), b"")
    expect("last word of the page before", cpu.read(rig.address(0) + last), GUEST)
    expect("first word of the page after", rig.read(2), GUEST + 2)
