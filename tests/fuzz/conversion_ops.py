"""What a random conversion program does: requests, accesses by guest and host, failures."""

from __future__ import annotations

import random
from typing import NamedTuple

from tests.fuzz.reference import SHARE, UNSHARE, Request
from vmm.core.ranges import PAGE_SIZE

PAGES = 16


POLICIES = ("allow", "deny", "partial", "widen", "defer", "defer-keep")
"""What the policy answers: "partial" the first half, "widen" with all neighbours in that state;
the last two put the discard of an unshare off, and `keep` the content or not."""


class Convert(NamedTuple):
    """`policy` is one of POLICIES. `fail_at`: which call into the host that changes something
    fails, counted from 0; None for none."""

    request: Request
    policy: str
    fail_at: int | None


class Fault(NamedTuple):
    """An access that wants the page in another state (an implicit conversion)."""

    kind: str
    page: int


class Settle(NamedTuple):
    """Time passes: the discards that were put off are due."""

    fail_at: int | None


class GuestRead(NamedTuple):
    """`other`: through the alias of the side that the page is not on, where there is one."""

    page: int
    other: bool


class GuestWrite(NamedTuple):
    page: int
    other: bool
    word: int


class HostRead(NamedTuple):
    first: int
    pages: int


class HostWrite(NamedTuple):
    first: int
    pages: int
    word: int


class Peek(NamedTuple):
    """The host reads any bytes, from `start` past the first page's; RAM or not."""

    start: int
    size: int


class Hold(NamedTuple):
    """Somebody takes references to a page, or (None) all are given back; in place only."""

    page: int | None


class Look(NamedTuple):
    """States and residency."""


Op = Convert | Fault | Settle | GuestRead | GuestWrite | HostRead | HostWrite | Peek | Hold | Look
Program = list[Op]


def random_program(chance: random.Random, length: int) -> Program:
    """`length` operations and a look at the end."""
    return [*(_random_op(chance) for _ in range(length)), Look()]


def _random_op(chance: random.Random) -> Op:
    first = chance.randrange(PAGES)
    count = chance.randint(1, min(6, PAGES - first))
    word = chance.getrandbits(63) | 1
    match chance.randrange(23):
        case 22:
            return Hold(first if chance.random() < 0.6 else None)
        case 21:
            start = page_edge(chance, first)
            return Peek(start, chance.choice((0, 1, 8, PAGE_SIZE, chance.randrange(3 * PAGE_SIZE))))
        case 20:
            return Fault(chance.choice((SHARE, UNSHARE)), first)
        case 0 | 1 | 2 | 3 | 4 | 5 | 6:
            return _random_conversion(chance, first, count)
        case 7:
            return Settle(0 if chance.random() < 0.2 else None)
        case 8 | 9 | 10:
            return GuestRead(first, chance.random() < 0.25)
        case 11 | 12 | 13 | 14:
            return GuestWrite(first, chance.random() < 0.25, word)
        case 15 | 16:
            return HostRead(first, count)
        case 17 | 18:
            return HostWrite(first, count, word)
    return Look()


def page_edge(chance: random.Random, page: int) -> int:
    """An offset at, before or behind a page's start, or somewhere in it."""
    within = chance.choice((0, -1, -8, 1, PAGE_SIZE - 8, chance.randrange(PAGE_SIZE)))
    return page * PAGE_SIZE + within


def _random_conversion(chance: random.Random, first: int, count: int) -> Convert:
    kind = chance.choice((SHARE, UNSHARE))
    policy = "allow" if chance.random() < 0.6 else chance.choice(POLICIES)
    fail_at = chance.randrange(3) if chance.random() < 0.15 else None
    if chance.random() < 0.1:
        return Convert(_bad_request(chance, kind, first, count), policy, fail_at)
    if chance.random() < 0.05:
        first, count = 0, PAGES
    return Convert(Request(kind, first, count), policy, fail_at)


def _bad_request(chance: random.Random, kind: str, first: int, count: int) -> Request:
    """One that breaks a rule, or several; now and then none after all."""
    match chance.randrange(6):
        case 0:
            return Request(kind, first, chance.choice((0, -1, PAGES + 1, 1 << 52, (1 << 64) - 1)))
        case 1:
            return Request(kind, first, count, offset=chance.choice((1, 512, PAGE_SIZE - 1)))
        case 2:
            return Request(kind, first, count, reserved=chance.choice((1 << 5, 1 << 63, 3)))
        case 3:
            return Request(kind, chance.choice((-1, PAGES, 1 << 40, 1 << 52)), count)
        case 4:
            return Request(kind, PAGES - 1, chance.randint(1, 4))
    return Request(kind, chance.randrange(1 << 52), chance.getrandbits(64))
