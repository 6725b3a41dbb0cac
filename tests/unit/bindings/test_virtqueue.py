"""Chains followed in C are those that the queue's own code finds, and what it refuses is left."""

from __future__ import annotations

import os
import random
import struct

import pytest

from kvm_bindings.virtqueue import MOST_ENTRIES, Chains, DiskPlanner
from vmm.core.errors import PyvmmError
from vmm.devices.virtio.budget import TURN_BYTES, TURN_DESCRIPTORS
from vmm.devices.virtio.queue import F_INDIRECT_DESC, SplitQueue, listed

FOREVER = 1 << 62
NEXT, WRITE, INDIRECT = 1, 2, 4
Row = tuple[int, int, int, int]


def table_of(rows: list[Row], size: int) -> bytes:
    """Descriptors (gpa, size, flags, next), and empty ones up to `size` of them."""
    return b"".join([struct.pack("<QIHH", *row) for row in rows]).ljust(16 * size, b"\0")


def ring_of(heads: list[int], rows: list[Row], size: int) -> bytes:
    """What a look at a queue reads."""
    entries = struct.pack(f"<{len(heads)}H", *heads).ljust(2 * size, b"\0")
    return struct.pack("<HH", 0, len(heads)) + entries + table_of(rows, size)


def found(ring: bytes, size: int, count: int, tables: bytes = b"") -> list[object] | None:
    chains = Chains()
    if not chains.find(ring, size, 0, count, tables, TURN_DESCRIPTORS, TURN_BYTES):
        return None
    return list(listed(chains))


class Tables:
    """Guest memory that holds a queue at 0x1000 and one indirect table, for SplitQueue."""

    def __init__(self, ring: bytes, size: int, indirect: bytes) -> None:
        self.fd = os.memfd_create("tables", os.MFD_CLOEXEC)
        os.pwrite(self.fd, ring[4 + 2 * size :], 0x1000)
        os.pwrite(self.fd, ring[: 4 + 2 * size], 0x4000)
        os.pwrite(self.fd, indirect, 0x8000)

    def pread(self, size: int, gpa: int) -> bytes:
        return os.pread(self.fd, size, gpa).ljust(size, b"\0")

    def pwrite(self, data: bytes, gpa: int) -> None:
        os.pwrite(self.fd, data, gpa)


def some_queue(seed: int) -> tuple[bytes, int, int, bytes]:
    """A ring such as a driver makes, with the odd thing that it should not do."""
    dice = random.Random(seed)
    size = 16
    # Few empty pieces, writable ones first, odd indexes and tables inside tables.
    flags = [0, NEXT, NEXT, NEXT, WRITE, WRITE | NEXT]
    flags += [INDIRECT] * (seed % 2) + [INDIRECT | NEXT] * (seed % 5 == 0)
    lengths = [16, 1, 512, 4096] + [0] * (seed % 3 == 0) + [0xFFFF_FFFF] * (seed % 7 == 0)
    bases = [0x10000, 0x20000] + [(1 << 64) - 100] * (seed % 11 == 0)

    def row(at: int) -> Row:
        flag = dice.choice(flags)
        if flag & INDIRECT:
            return 0x8000, 16 * dice.choice([1, 2, 4]), flag, dice.randrange(size)
        following = at + 1 if dice.random() < 0.9 else dice.randrange(size + (seed % 13 == 0))
        return (dice.choice(bases) + 64 * at) % (1 << 64), dice.choice(lengths), flag, following

    rows = [row(at) for at in range(size)]
    heads = [dice.randrange(size + (seed % 17 == 0)) for _ in range(dice.randint(1, 6))]
    indirect = table_of(
        [(0x30000 + 512 * i, 64, dice.choice([NEXT, 0, NEXT | WRITE]), i + 1) for i in range(4)], 4
    )
    return ring_of(heads, rows, size), size, len(heads), indirect


@pytest.mark.parametrize("seed", range(300))
def test_chains_found_are_those_that_the_queue_follows(seed: int) -> None:
    ring, size, count, indirect = some_queue(seed)
    memory = Tables(ring, size, indirect)
    queue = SplitQueue(memory, size, 0x1000, 0x4000, 0x6000, F_INDIRECT_DESC)
    chains = Chains()
    try:
        expected = queue.take()
    except PyvmmError:
        expected = None
    finally:
        os.close(memory.fd)

    pieces = chains.tables(ring, size, 0, count, 1 << 20)
    same = None
    if pieces is not None:
        tables = b"".join([indirect[:length] for length in pieces[1::2]])
        same = found(ring, size, count, tables)

    if same is not None:
        assert same == expected
    elif expected is not None:  # rare things are left to the queue
        rows = [struct.unpack_from("<QIHH", ring, 4 + 2 * size + 16 * i) for i in range(size)]
        assert any(row[1] == 0 or row[2] & INDIRECT for row in rows)


def test_chains_of_a_usual_request_are_found() -> None:
    rows = [(0x1000, 16, NEXT, 1), (0x2000, 512, NEXT | WRITE, 2), (0x3000, 1, WRITE, 0)]

    chains = found(ring_of([0], rows, 4), 4, 1)

    assert chains == [(0, [(0x1000, 16)], [(0x2000, 512), (0x3000, 1)])]


@pytest.mark.parametrize(
    "rows",
    [
        [(0x1000, 16, NEXT, 0)],  # a loop
        [(0x1000, 16, NEXT, 4)],  # past the table
        [(0x1000, 16, NEXT | WRITE, 1), (0x2000, 16, 0, 0)],  # readable after writable
        [((1 << 64) - 8, 16, 0, 0)],  # past the address space
        [(0x1000, 1 << 31, NEXT, 1), (0x1000, 1 << 31, 0, 0)],  # 4 GiB
        [(0x1000, 32, INDIRECT, 0)],  # a table that nobody has read
    ],
)
def test_chain_that_breaks_a_rule_is_not_found(rows: list[Row]) -> None:
    assert found(ring_of([0], rows, 4), 4, 1) is None


def test_chains_end_where_the_limits_are() -> None:
    rows = [(0x1000 * i, 100, 0, 0) for i in range(4)]
    ring = ring_of([0, 1, 2, 3], rows, 4)
    chains = Chains()

    assert chains.find(ring, 4, 0, 4, b"", 2, FOREVER)
    assert (chains.count, chains.descriptors) == (2, 2)
    assert chains.find(ring, 4, 0, 4, b"", 100, 201)
    assert chains.count == 3


def test_chains_longer_than_there_is_room_for_are_not_found() -> None:
    size = MOST_ENTRIES
    rows = [(0x1000, 1, NEXT, i + 1) for i in range(size - 1)] + [(0x1000, 1, 0, 0)]

    ring = ring_of([0] * size, rows, size)
    assert not Chains().find(ring, size, 0, size, b"", 1 << 20, FOREVER)
    assert Chains().find(ring, size, 0, 8, b"", 1 << 20, FOREVER)


def test_tables_of_a_size_that_is_not_allowed_are_not_the_usual() -> None:
    for length in (0, 8, 24, 16 * 1025):
        ring = ring_of([0], [(0x1000, length, INDIRECT, 0)], 4)
        assert Chains().tables(ring, 4, 0, 1, 100) is None


def disk_chains(*requests: tuple[int, int, list[int]], cut: int = 1) -> tuple[Chains, bytes]:
    """Requests (type, sector, sizes of their data), from 0x10000 on; and their headers."""
    rows: list[Row] = []
    heads, headers = [], b""
    at = 0x10000
    for kind, sector, sizes in requests:
        heads.append(len(rows))
        headers += struct.pack("<IIQ", kind, 0, sector)
        rows.append((0x1000 + 16 * len(heads), 16, NEXT, len(rows) + 1))
        for size in sizes:
            rows.append((at, size, NEXT | (0 if kind == 1 else WRITE), len(rows) + 1))
            at += size
        rows.append((0x2000 + len(heads), cut, WRITE, 0))
    chains = Chains()
    size = 64
    assert chains.find(ring_of(heads, rows, size), size, 0, len(heads), b"", 1 << 20, FOREVER)
    return chains, headers


def test_plan_joins_neighbours_and_keeps_directions_apart() -> None:
    chains, headers = disk_chains((0, 4, [512, 512]), (0, 6, [512]), (1, 0, [1024]), (0, 0, [512]))
    planner = DiskPlanner()

    pieces = planner.headers(chains)
    plan = planner.plan(chains, headers, 1 << 20, True, 10, FOREVER)

    assert pieces == [0x1010, 16, 0x1020, 16, 0x1030, 16, 0x1040, 16]
    assert plan.reads == [2048, 0x10000, 1536, 0, 0x10A00, 512]
    assert plan.writes == [0x10600, 0, 1024]
    assert plan.statuses == [0x2001, 1, 0x2002, 1, 0x2003, 1, 0x2004, 1]
    elements = list(struct.iter_unpack("<II", plan.elements))
    assert elements == [(0, 1025), (4, 513), (7, 1), (10, 513)]
    assert (plan.bytes_read, plan.bytes_written, plan.cost) == (2048, 1024, 3072 + 40)


@pytest.mark.parametrize(
    ("odd", "may_write"),
    [
        ((4, 0, [512]), True),  # another type
        ((0, 3, [512]), True),  # past the end of the disk
        ((0, 2, [512, 512]), True),  # reaches over it
        ((0, (1 << 55) + 1, [512]), True),  # whose position has more than 64 bits
        ((0, 0, [100]), True),  # not whole sectors
        ((1, 0, [512]), False),
    ],
)
def test_plan_ends_before_a_request_that_is_not_plain(
    odd: tuple[int, int, list[int]], may_write: bool
) -> None:
    chains, headers = disk_chains((0, 0, [512]), odd, (0, 1, [512]))
    planner = DiskPlanner()

    plan = planner.plan(chains, headers, 3 * 512, may_write, 10, FOREVER)
    planner.done(chains, plan)

    assert plan.requests == 1
    assert [chain.head for chain in listed(chains)] == [3, 6 + len(odd[2]) - 1]
    assert planner.plan(chains, headers[16:], 3 * 512, may_write, 10, FOREVER).requests == 0


def test_plan_ends_where_it_would_cost_too_much() -> None:
    chains, headers = disk_chains((0, 0, [512]), (0, 1, [512]), (0, 2, [512]))

    assert DiskPlanner().plan(chains, headers, 1 << 20, True, 10, 2 * 522).requests == 2


def test_headers_end_before_a_request_that_is_cut_otherwise() -> None:
    chains, _ = disk_chains((0, 0, [512]), cut=2)

    assert DiskPlanner().headers(chains) == []
