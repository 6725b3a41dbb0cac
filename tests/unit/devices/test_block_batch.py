"""A batch served together is the same as its requests served one after the other."""

from __future__ import annotations

import os
import random
from typing import cast

import pytest

from tests.support.disk_machine import DATA, DiskMachine, MakeMachine, pattern
from tests.support.fake_memory import BatchingFakeMemory
from tests.support.virtio_driver import NEEDS_RESET, Piece, VirtioQueueDriver
from vmm.core.ranges import Range
from vmm.devices.virtio import budget
from vmm.devices.virtio.block import F_FLUSH, S_IOERR, S_OK, T_FLUSH, T_GET_ID, T_IN, T_OUT
from vmm.devices.virtio.block_file import ReadAhead

SECTORS = 256


@pytest.fixture
def batching(make_machine: MakeMachine) -> DiskMachine:
    return make_machine(batching=True)


def offer(
    machine: DiskMachine, queue: VirtioQueueDriver, *requests: tuple[int, int, list[Piece]]
) -> tuple[list[int], list[int]]:
    """Put requests (type, sector, data) into the ring at once; their heads and status addresses."""
    heads, statuses = [], []
    for kind, sector, data in requests:
        pieces, status = machine.request(kind, sector, *data)
        heads.append(queue.chain(pieces))
        statuses.append(status)
    queue.offer(*heads)
    machine.memory.calls.clear()
    machine.driver.notify()
    return heads, statuses


def answers(machine: DiskMachine, statuses: list[int]) -> list[int]:
    return [machine.memory.peek(1, status)[0] for status in statuses]


def test_batch_is_a_handful_of_calls_however_many_requests_it_has(batching: DiskMachine) -> None:
    queue = batching.up()
    pieces = [(T_IN, 2 * i, [Piece(DATA + 0x1000 * i, 512, True)]) for i in range(8)]

    heads, statuses = offer(batching, queue, *pieces)

    assert queue.collect() == [(head, 513) for head in heads]
    assert answers(batching, statuses) == [S_OK] * 8
    assert batching.memory.peek(512, DATA + 0x3000) == batching.disk_bytes()[3072:3584]
    assert len(batching.interrupts) == 1
    # index with entries and table, headers; event, index again; data; statuses and ring; event
    calls = {"pread": 2, "pwrite": 1, "read_many": 2, "move_in": 1, "write_many": 1}
    assert batching.memory.calls == calls
    assert batching.block.statistics.bytes_read == 8 * 512


def test_batch_of_neighbours_is_one_move(
    batching: DiskMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = batching.up()
    seen: list[list[int]] = []

    def move_out(moves: list[int], _fd: int) -> int:
        seen.append(moves)
        return sum(moves[2::3])

    monkeypatch.setattr(batching.memory, "move_out", move_out)
    requests = [(T_OUT, 3 + i, [Piece(DATA + 512 * i, 512)]) for i in range(4)]

    offer(batching, queue, *requests, (T_OUT, 9, [Piece(DATA + 2048, 512)]))

    assert seen == [[DATA, 3 * 512, 2048, DATA + 2048, 9 * 512, 512]]


def test_request_of_scattered_pages_is_one_move_too(batching: DiskMachine) -> None:
    """As stock kernels read ahead: 128 KiB into 32 pages of their page cache."""
    queue = batching.up()
    pages = [Piece(DATA + 0x2000 * i, 1024, True) for i in range(4)]

    (head,), statuses = offer(batching, queue, (T_IN, 8, pages))

    assert queue.collect() == [(head, 4097)]
    assert answers(batching, statuses) == [S_OK]
    assert batching.memory.calls["move_in"] == 1
    assert "transfer_in" not in batching.memory.calls
    assert batching.memory.peek(1024, DATA + 0x4000) == batching.disk_bytes()[6144:7168]


def test_batch_with_a_request_past_the_end_answers_each_for_itself(batching: DiskMachine) -> None:
    queue = batching.up()
    good = (T_IN, 5, [Piece(DATA, 512, True)])

    heads, statuses = offer(batching, queue, good, (T_IN, 64, [Piece(DATA + 512, 512, True)]), good)

    assert answers(batching, statuses) == [S_OK, S_IOERR, S_OK]
    assert queue.collect() == [(heads[0], 513), (heads[1], 0), (heads[2], 513)]


def test_batch_on_a_file_cut_short_answers_each_for_itself(batching: DiskMachine) -> None:
    queue = batching.up()
    os.truncate(batching.path, 7 * 512)

    _, statuses = offer(
        batching, queue, *[(T_IN, s, [Piece(DATA + 4096 * s, 512, True)]) for s in (5, 6, 7, 4)]
    )

    assert answers(batching, statuses) == [S_OK, S_OK, S_IOERR, S_OK]


def test_batch_that_names_private_memory_stops_the_device_after_those_before_it(
    batching: DiskMachine,
) -> None:
    queue = batching.up()
    batching.memory.private.append(Range(DATA + 0x4000, 0x1000))

    heads, _ = offer(
        batching,
        queue,
        (T_IN, 0, [Piece(DATA, 512, True)]),
        (T_IN, 1, [Piece(DATA + 0x4000, 512, True)]),
        (T_IN, 2, [Piece(DATA + 0x1000, 512, True)]),
    )

    assert queue.collect() == [(heads[0], 513)]
    assert batching.driver.status & NEEDS_RESET
    assert batching.memory.peek(512, DATA + 0x4000) == bytes(512)


def test_batch_is_cut_where_a_turn_ends_and_goes_on(
    make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "TURN_BYTES", 1024)
    rung: list[int] = []
    machine = make_machine(batching=True, ring=rung.append)
    queue = machine.up()

    heads, _ = offer(
        machine, queue, *[(T_IN, 2 * i, [Piece(DATA + 4096 * i, 512, True)]) for i in range(5)]
    )
    turns = []
    while rung:
        machine.transport.notify(rung.pop())
        turns.append([head for head, _ in queue.collect()])

    assert turns == [heads[0:2], heads[2:4], heads[4:5]]


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize("step", [1, 512, 700])
def test_batch_that_stops_because_the_host_is_slow_goes_on_where_it_was(
    batching: DiskMachine, monkeypatch: pytest.MonkeyPatch, kind: int, step: int
) -> None:
    queue, memory = batching.up(), cast(BatchingFakeMemory, batching.memory)
    real_in, real_out = memory.move_in, memory.move_out
    monkeypatch.setattr(memory, "move_in", lambda fd, m: real_in(fd, [*m[:2], min(m[2], step)]))
    monkeypatch.setattr(memory, "move_out", lambda m, fd: real_out([*m[:2], min(m[2], step)], fd))
    data = b"in memory" * 200
    memory.poke(data, DATA)
    sizes = (1024, 512)
    requests = [
        (kind, 4 + 4 * i, [Piece(DATA + 1024 * i, size, kind == T_IN)])
        for i, size in enumerate(sizes)
    ]

    _, statuses = offer(batching, queue, *requests)

    assert answers(batching, statuses) == [S_OK] * 2
    assert len(queue.collect()) == 2
    assert not {"transfer_in", "transfer_out"} & memory.calls.keys()
    for i, size in enumerate(sizes):
        found = memory.peek(size, DATA + 1024 * i)
        start = 512 * (4 + 4 * i)
        assert found == batching.disk_bytes()[start : start + size]
        assert (found == data[1024 * i : 1024 * i + size]) is (kind == T_OUT)


def test_batch_whose_reads_were_slow_has_the_place_behind_them_looked_at(
    batching: DiskMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, now, looked = batching.up(), 0.0, []

    def slow(_fd: int, moves: list[int]) -> int:
        nonlocal now
        now += 1.0
        return sum(moves[2::3])

    monkeypatch.setattr(batching.memory, "move_in", slow)
    monkeypatch.setattr("vmm.devices.virtio.block_batch.time.monotonic", lambda: now)
    monkeypatch.setattr(ReadAhead, "look", lambda _, end: looked.append(end))
    requests = [(T_IN, sector, [Piece(DATA + 512 * sector, 512, True)]) for sector in (9, 3)]

    offer(batching, queue, *requests)

    assert looked == [4 * 512]
    assert queue.used_index() == 2


@pytest.mark.parametrize(("features", "synced"), [(0, 1), (F_FLUSH, 0)])
def test_batch_of_writes_is_synced_once_where_the_driver_cannot_flush(
    batching: DiskMachine, monkeypatch: pytest.MonkeyPatch, features: int, synced: int
) -> None:
    queue = batching.up(features)
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)

    offer(batching, queue, *[(T_OUT, 2 * i, [Piece(DATA, 512)]) for i in range(4)])

    assert len(calls) == synced


def some_batch(seed: int) -> list[tuple[int, int, list[Piece]]]:
    """Requests that a driver might make, with the odd one that it should not.

    No two of them overlap on the disk: a device may serve those in any order.
    """
    dice = random.Random(seed)
    batch = []
    room = DATA
    starts = dice.sample(range(0, SECTORS + 24 * (seed % 7 == 0), 24), 10)
    for start in starts[: dice.randint(1, 10)]:
        kind = dice.choice([T_IN, T_IN, T_OUT, T_OUT, T_FLUSH, T_GET_ID] if seed % 3 else [0, 1])
        pieces = []
        for _ in range(dice.randint(0, 3) if seed % 5 == 0 else 1):
            size = dice.choice([512, 1024, 4096])
            pieces.append(Piece(room, size, kind in (T_IN, T_GET_ID)))
            room += size + dice.choice([0, 0, 512])
        batch.append((kind, start, pieces))
    return batch


@pytest.mark.parametrize("seed", range(40))
def test_batch_does_what_its_requests_one_by_one_do(make_machine: MakeMachine, seed: int) -> None:
    seen = []
    for batching in (True, False):
        machine = make_machine(SECTORS, ",serial=same", batching=batching)
        queue = machine.up()
        machine.memory.poke(pattern(0x10000, seed), DATA)
        _, statuses = offer(machine, queue, *some_batch(seed))
        seen.append(
            (
                queue.collect(),
                answers(machine, statuses),
                machine.memory.peek(0x20000, DATA),
                machine.disk_bytes(),
                # what came back of requests, and how many bytes went where
                machine.block.statistics.as_dict(),
            )
        )

    together, one_by_one = seen
    assert together[:4] == one_by_one[:4]
    if not together[4]["errors"]:
        assert together[4] == one_by_one[4]
