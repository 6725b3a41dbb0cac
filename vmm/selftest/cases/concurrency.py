"""Conversions of overlapping ranges from 4 vCPUs, while the host does I/O and guests run."""

from __future__ import annotations

import random
import threading
from functools import partial

from vmm.arch.guest_cpu import WORD, WORDS_A_PAGE
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.guest_memory import PageState
from vmm.selftest.case import Cell, Failed, case, expect
from vmm.selftest.cases.patterns import together
from vmm.selftest.rig import Rig

VCPUS, ROUNDS, PAGES = 4, 60, 24
OWN = 4
"""Pages after the fought-over ones that each vCPU has to itself, and nobody converts."""
HOST, GUEST = 0x7777_686F_7374_0000, 0x8888_6775_6573_7400


@case("4 vCPUs convert overlapping ranges while I/O runs, and everything adds up")
def overlapping_conversions(cell: Cell) -> None:
    rig = cell.rig(pages=PAGES + OWN * VCPUS, vcpus=VCPUS)
    over = threading.Event()
    done: list[int] = []
    devices = [
        threading.Thread(target=do_io, args=(rig, over, seed, done), daemon=True)
        for seed in range(2)
    ]
    for device in devices:
        device.start()
    try:
        together([partial(convert_at_random, rig, number) for number in range(VCPUS)])
    finally:
        over.set()
        for device in devices:
            device.join(60)
    if len(done) != len(devices):
        raise Failed("a device's thread failed or did not end")
    adds_up(rig)


def convert_at_random(rig: Rig, number: int) -> None:
    """One vCPU: conversions anywhere, and words of its own that must stay."""
    chance = random.Random(number)
    own = PAGES + OWN * number
    rig.fill(own, OWN, GUEST + number, number)
    for _ in range(ROUNDS):
        first = chance.randrange(PAGES)
        count = chance.randint(1, min(8, PAGES - first))
        convert = chance.choice((rig.share, rig.unshare))
        expect("answer", convert(first, count, number), 0)
        expect("words of a vCPU's own pages", rig.holds(own, OWN, GUEST + number, number), True)


def do_io(rig: Rig, over: threading.Event, seed: int, done: list[int]) -> None:
    """A device: writes and reads whole ranges wherever it may, until it is told to stop."""
    chance = random.Random(1000 + seed)
    words = (HOST + seed).to_bytes(WORD, "little") * WORDS_A_PAGE
    accesses = 0
    while not over.is_set():
        first = chance.randrange(PAGES)
        count = chance.randint(1, min(8, PAGES - first))
        try:
            rig.memory.pwrite(words * count, rig.device_gpa(first))
            rig.memory.pread(count * PAGE_SIZE, rig.device_gpa(first))
        except PrivateAccess:
            continue
        accesses += 1
    done.append(accesses)


def adds_up(rig: Rig) -> None:
    """States, accounting and both sides agree, and no device's word is on the private side."""
    counts = rig.converter.accounting
    shared = rig.memory.bytes_in(PageState.SHARED)
    expect("bytes shared in the end", shared, counts.share.bytes - counts.unshare.bytes)
    expect("requests", counts.share.calls + counts.unshare.calls, VCPUS * ROUNDS)
    expect("pages in conversion", rig.memory.bytes_in(PageState.CONVERTING), 0)
    for page in range(PAGES):
        word, state = rig.read(page), rig.state(page)
        if state is not PageState.SHARED and word:
            raise Failed(f"private page {page} holds {word:#x}, which only a device wrote")
        if state is PageState.SHARED:
            expect(f"host's word of shared page {page}", rig.host_read(page), word)


@case("a guest that writes while its other pages are converted loses no write")
def writes_beside_conversions_stay(cell: Cell) -> None:
    rig = cell.rig(pages=16, vcpus=2)

    def write() -> None:
        for round in range(200):
            page = 8 + round % 8
            rig.write(page, GUEST + round, 1)
            expect(f"word of page {page}", rig.read(page, 1), GUEST + round)

    def convert() -> None:
        for round in range(30):
            expect("answer", (rig.unshare if round % 2 else rig.share)(0, 8, 0), 0)

    together([write, convert])
