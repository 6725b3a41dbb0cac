"""A guest that shares and unshares its pages itself, and what the host finds in them by trying."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Protocol, cast

from kvm_bindings import fdops
from vmm.arch.guest_cpu import WORD, WORDS_A_PAGE
from vmm.conversion.schemes.pkvm import MEM_SHARE, MEM_UNSHARE
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.observed_memory import ObservedMemory
from vmm.selftest.case import Cell, Failed, Skipped, case, expect, expect_error
from vmm.selftest.rig import Rig

GUEST, HOST, OTHER = 0x5555_6775_6573_7400, 0x6666_686F_7374_0000, 0x7777_6F74_6865_7200


class Calling(Protocol):
    """A GuestCpu whose architecture has hypercalls to ask with."""

    def hypercall(self, function: int, *arguments: int) -> int:
        """The guest makes one (function identifier, then arguments); x0 of its answer."""
        ...


def convert(rig: Rig, function: int, first: int, count: int = 1) -> None:
    """The guest asks the hypervisor, page by page. Raises Failed where it refuses."""
    cpu = rig.guests[0]
    if not hasattr(cpu, "hypercall"):
        raise Skipped("this architecture's guest has no hypercall for it")
    for page in range(first, first + count):
        answer = cast(Calling, cpu).hypercall(function, rig.gpa(page), 0, 0)
        word = "share" if function == MEM_SHARE else "unshare"
        expect(f"answer to {word} of page {page}", answer, 0)


def out_of_reach(rig: Rig, page: int) -> None:
    """Every way to the page is an error, and not a byte moves."""
    for what in (rig.host_read, lambda page: rig.host_write(page, HOST)):
        try:
            found = what(page)
        except PrivateAccess:
            continue
        raise Failed(f"an access to private page {page} went through ({found})")
    scratch = os.memfd_create("pyvmm-selftest", os.MFD_CLOEXEC)
    address = rig.memory.shared.hva + rig.gpa(page)
    try:
        os.pwrite(scratch, b"\x66" * PAGE_SIZE, 0)
        expect_error(
            f"pwrite from private page {page}",
            lambda: fdops.pwrite_from_address(scratch, address, PAGE_SIZE, 0),
            errno.EFAULT,
        )
        expect_error(
            f"pread into private page {page}",
            lambda: fdops.pread_to_address(scratch, address, PAGE_SIZE, 0),
            errno.EFAULT,
        )
        expect("bytes that came out", os.pread(scratch, PAGE_SIZE, 0) == b"\x66" * PAGE_SIZE, True)
    finally:
        os.close(scratch)


def tried(rig: Rig, pages: range) -> list[bool]:
    memory = rig.memory
    assert isinstance(memory, ObservedMemory)
    return memory.probe([rig.gpa(page) for page in pages])


@case("what a protected guest keeps is EFAULT to the host, never a byte, and stays as it is")
def kept_pages_are_out_of_reach(cell: Cell) -> None:
    rig = cell.protected()
    rig.fill(0, 4, GUEST)
    for page in range(4):
        out_of_reach(rig, page)
    expect("guest's own view", rig.holds(0, 4, GUEST), True)


@case("a page that a protected guest shares is the same page to both, with its words")
def shared_page_is_one_page(cell: Cell) -> None:
    rig = cell.protected()
    rig.fill(2, 2, GUEST)
    convert(rig, MEM_SHARE, 2, 2)
    expect("host's view of the guest's words", rig.host_holds(2, 2, GUEST), True)
    rig.host_fill(2, 2, HOST)
    expect("guest's view of the host's words", rig.holds(2, 2, HOST), True)


@case("a page that a protected guest takes back is out of the host's reach again")
def page_taken_back_is_out_of_reach(cell: Cell) -> None:
    rig = cell.protected()
    rig.write(1, GUEST)
    for word in (HOST, HOST + 1):
        convert(rig, MEM_SHARE, 1)
        rig.host_write(1, word)
        convert(rig, MEM_UNSHARE, 1)
        out_of_reach(rig, 1)
        expect("the guest's word, as the host left it", rig.read(1), word)
    rig.write(1, OTHER)
    out_of_reach(rig, 1)
    expect("the guest's last word", rig.read(1), OTHER)


@case("a share by a protected guest leaves the pages beside it private")
def neighbours_stay_private(cell: Cell) -> None:
    rig = cell.protected()
    rig.fill(0, 8, GUEST)
    convert(rig, MEM_SHARE, 3, 2)
    rig.host_fill(3, 2, HOST)
    for page in (2, 5):
        out_of_reach(rig, page)
    wanted = [False, False, False, True, True, False, False, False]
    expect("pages reached by trying", tried(rig, range(8)), wanted)
    expect("pages before", rig.holds(0, 3, GUEST), True)
    expect("pages behind", rig.holds(5, 3, GUEST), True)


@case("a host access that runs into a protected guest's page stops exactly at its boundary")
def access_stops_at_the_boundary(cell: Cell) -> None:
    rig = cell.protected()
    rig.fill(0, 2, GUEST)
    convert(rig, MEM_SHARE, 0)
    scratch = os.memfd_create("pyvmm-selftest", os.MFD_CLOEXEC)
    cell.closing(lambda: os.close(scratch))
    address = rig.memory.shared.hva + rig.gpa(0) + 100
    moved = fdops.pwrite_from_address(scratch, address, PAGE_SIZE, 0)
    expect("bytes before the boundary", moved, PAGE_SIZE - 100)
    try:
        rig.host_fill(0, 2, HOST)
    except PrivateAccess:
        pass
    else:
        raise Failed("a host write over a private page went through")
    expect("private page", rig.holds(1, 1, GUEST), True)
    words = rig.memory.pread(PAGE_SIZE, rig.gpa(0))
    expect("shared page", words == HOST.to_bytes(WORD, "little") * WORDS_A_PAGE, True)


@case("a page that a protected guest has not touched is the host's, and comes to it with its words")
def untouched_page_is_the_hosts(cell: Cell) -> None:
    rig = cell.protected()
    rig.host_write(4, HOST)
    expect("guest's first look at it", rig.read(4), HOST)
    out_of_reach(rig, 4)
    expect("word after that", rig.read(4), HOST)


@case("once a protected guest runs, its memory's own fd reads, writes and gives back nothing")
def own_fd_is_shut(cell: Cell) -> None:
    rig = cell.protected()
    rig.write(0, GUEST)
    fd = rig.memory.shared.fd
    calls: dict[str, Callable[[], object]] = {
        "pread": lambda: os.pread(fd, 1, rig.gpa(0)),
        "pwrite": lambda: os.pwrite(fd, b"x", rig.gpa(0)),
        "a hole": lambda: fdops.punch_hole(fd, rig.gpa(0), PAGE_SIZE),
        "a second mapping": lambda: fdops.map_shared(fd, PAGE_SIZE),
    }
    for what, call in calls.items():
        expect_error(what, call, errno.EBADF)
    expect("guest's word", rig.read(0), GUEST)
