"""Scenarios written as programs: guests that no stock kernel is, but that policies meet."""

from __future__ import annotations

import errno

from vmm.core.ranges import PAGE_SIZE, Range
from vmm.scenario.definition import Scenario, Steps, scenario
from vmm.scenario.guest import Guest
from vmm.scenario.recorded import BALLOON, recording
from vmm.scenario.steps import Discard, Fault, Io, Share, Unshare, Wait

KIB, MIB = 1 << 10, 1 << 20
PAGES_OF_A_REQUEST = 256
"""VIRTIO_BALLOON_ARRAY_PFNS_MAX of Linux' drivers/virtio/virtio_balloon.c."""


@scenario(name="streaming-dma", ram=256 * MIB)
def streaming_dma(
    guest: Guest, requests: int = 2000, size: int = 64 * KIB, pace: float = 0.0005, slots: int = 16
) -> Steps:
    """A driver that shares each buffer for as long as the device has it.

    Where a share is refused it tries again twice, a little later each time; then it takes one of
    `slots` bounce slots, which it shared at the start, and loses the time of the copy.
    """
    bounce: list[Range] = []
    for _ in range(slots):
        area = guest.allocate(size)
        if (yield Share(area)) == 0:
            bounce.append(area)
    for _ in range(requests):
        yield Wait(guest.rng.expovariate(1 / pace))
        buffer = guest.allocate(size)
        answer = yield Share(buffer)
        for delay in (0.001, 0.01):
            if answer not in (-errno.EAGAIN, -errno.EBUSY):
                break
            yield Wait(delay)
            answer = yield Share(buffer)
        if answer == 0:
            yield Io("disk", buffer, is_write=True)
            yield Unshare(buffer)
        elif bounce:
            yield Io("disk", guest.rng.choice(bounce), is_write=True)
            yield Wait(size / 4e9)  # copied at 4 GB/s
        guest.free(buffer)


@scenario(ram=512 * MIB)
def balloon(guest: Guest, pages: int = 16384, deflate: bool = True) -> Steps:
    """A guest gives up `pages` pages by its balloon, and takes them back.

    Linux hands 256 pages to its device with each request; the pauses between requests are those
    that an ordinary 6.12 was recorded with (its driver doesn't load in a guest with private
    memory: it doesn't take ACCESS_PLATFORM). The guest's pages are wherever its allocator had
    room, so that few of them meet.
    """
    pauses = [each.pause for each in recording(BALLOON).events if each.device == "balloon"][1:]
    given: list[Range] = []
    for number in range(0, pages, PAGES_OF_A_REQUEST):
        yield Wait(guest.rng.choice(pauses) * 1e-6)
        for _ in range(min(PAGES_OF_A_REQUEST, pages - number)):
            page = guest.allocate(PAGE_SIZE)
            if guest.rng.random() < 0.1:  # somebody else's page is in between
                page = guest.allocate(PAGE_SIZE)
            given.append(page)
            yield Discard(page)
    while deflate and given:
        # What it takes back is in use again at once: for a device's buffers, one in eight.
        page = given.pop()
        if guest.rng.random() < 0.125 and (yield Share(page)) == 0:
            yield Io("disk", page, is_write=True)
            yield Unshare(page)


@scenario(ram=128 * MIB, cpus=4)
def contention(guest: Guest, rounds: int = 500, size: int = 2 * MIB) -> Steps:
    """Four vCPUs that share and unshare parts of the same memory, now and then by touching it."""
    if guest.vcpu == 0:  # the first to run
        guest.common["pool"] = guest.allocate(16 * size)
    pool: Range = guest.common["pool"]
    for _ in range(rounds):
        yield Wait(guest.rng.expovariate(2000))
        first = guest.rng.randrange(pool.size // PAGE_SIZE)
        count = guest.rng.randint(1, min(16, pool.size // PAGE_SIZE - first))
        area = Range(pool.start + first * PAGE_SIZE, count * PAGE_SIZE)
        way = guest.rng.randrange(4)
        if way == 0:
            yield Fault(area, private=guest.rng.random() < 0.5)
        elif (yield Share(area)) == 0:
            yield Wait(guest.rng.expovariate(5000))
            yield Unshare(area)


@scenario(ram=64 * MIB)
def hostile(guest: Guest, requests: int = 2000) -> Steps:
    """A guest that asks for what it must not have: no RAM, no whole pages, all of it, every second
    page, and pages that it hasn't shared for its devices."""
    ram = guest.ram_bytes
    for _ in range(requests):
        area = guest.random_area(16 * PAGE_SIZE)
        which = guest.rng.randrange(6)
        if which == 0:
            area = Range(ram - PAGE_SIZE, 2 * PAGE_SIZE)
        elif which == 1:
            area = Range(area.start + 1, area.size)
        elif which == 2:
            area = Range(0, ram)
        elif which == 3:
            area = Range(area.start, 0)
        elif which == 4:
            area = Range(guest.rng.getrandbits(63) & -PAGE_SIZE, PAGE_SIZE)
        yield (Share if guest.rng.random() < 0.7 else Unshare)(area)
        yield Io("disk", Range(*guest.random_area(PAGE_SIZE)), is_write=guest.rng.random() < 0.5)


ALL: tuple[Scenario, ...] = (streaming_dma, balloon, contention, hostile)
