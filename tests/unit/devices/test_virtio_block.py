"""virtio-blk from the guest's side: what reaches the disk and guest memory, and what can't."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

import pytest

from tests.support.disk_machine import DATA, DiskMachine, MakeMachine, pattern
from tests.support.virtio_driver import NEEDS_RESET, Piece, VirtioQueueDriver
from vmm.core.ranges import Range
from vmm.devices.virtio import budget
from vmm.devices.virtio.block import (
    F_DISCARD,
    F_FLUSH,
    F_RO,
    F_WRITE_ZEROES,
    MAX_DISCARD_RANGES,
    MAX_DISCARD_SECTORS,
    MAX_ZERO_SECTORS,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from vmm.devices.virtio.pci_transport import LOOKS_AT_ONCE


def blk_range(sector: int, count: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, count, flags)


def refuse(error: int) -> None:
    raise OSError(error, os.strerror(error))


def punch_not_supported(_fd: int, _offset: int, _size: int) -> None:
    refuse(errno.EOPNOTSUPP)


def punch_not_aligned(_fd: int, _offset: int, _size: int) -> None:
    refuse(errno.EINVAL)  # a block device with sectors of 4 KiB


def punch_by_zeroes(fd: int, offset: int, size: int) -> None:
    os.pwrite(fd, bytes(size), offset)


def test_block_config_tells_capacity_and_limits(machine: DiskMachine) -> None:
    driver, ports = machine.driver, machine.ports
    driver.enable()
    raw = b"".join(
        ports.read(driver.device_config + offset, 4).to_bytes(4, "little")
        for offset in range(0, driver.capabilities[4].length, 4)
    )

    assert len(raw) == 60
    assert struct.unpack_from("<Q", raw, 0) == (64,)
    assert struct.unpack_from("<I", raw, 12) == (254,)  # seg_max
    assert struct.unpack_from("<I", raw, 20) == (512,)  # blk_size
    assert raw[32] == 1  # writeback
    assert struct.unpack_from("<H", raw, 34) == (1,)  # num_queues
    assert struct.unpack_from("<III", raw, 36) == (MAX_DISCARD_SECTORS, MAX_DISCARD_RANGES, 8)
    assert struct.unpack_from("<II", raw, 48) == (MAX_ZERO_SECTORS, 1)
    assert raw[56] == 0  # may not unmap: nothing was given to punch with


def test_block_read_fills_guest_memory(machine: DiskMachine) -> None:
    queue = machine.up()

    status, length = machine.do(
        queue, T_IN, 2, Piece(DATA, 1024, True), Piece(DATA + 0x3000, 512, True)
    )

    assert (status, length) == (S_OK, 1537)
    disk = machine.disk_bytes()
    assert machine.memory.peek(1024, DATA) == disk[1024:2048]
    assert machine.memory.peek(512, DATA + 0x3000) == disk[2048:2560]
    assert machine.block.statistics.bytes_read == 1536


def test_block_write_reaches_the_disk(machine: DiskMachine) -> None:
    queue = machine.up()
    data = pattern(1536, seed=99)
    machine.memory.poke(data, DATA)
    before = machine.disk_bytes()

    status, length = machine.do(queue, T_OUT, 61, Piece(DATA, 512), Piece(DATA + 512, 1024))

    assert (status, length) == (S_OK, 1)
    assert machine.disk_bytes() == before[: 61 * 512] + data
    assert machine.block.statistics.bytes_written == 1536


def test_block_neighbouring_segments_move_in_one_transfer(machine: DiskMachine) -> None:
    queue = machine.up()
    pieces = [Piece(DATA + 512 * i, 512, True) for i in range(8)]

    machine.do(queue, T_IN, 0, *pieces, Piece(DATA + 0x8000, 512, True))

    assert machine.memory.calls["transfer_in"] == 2
    assert machine.memory.peek(4096, DATA) == machine.disk_bytes()[:4096]
    assert machine.memory.peek(512, DATA + 0x8000) == machine.disk_bytes()[4096:4608]


def test_block_batch_costs_few_calls_and_one_interrupt(machine: DiskMachine) -> None:
    queue = machine.up()
    heads = []
    for i in range(8):
        pieces, _ = machine.request(T_IN, i, Piece(DATA + 0x1000 * i, 512, True))
        heads.append(queue.chain(pieces))
    queue.offer(*heads)
    machine.memory.calls.clear()

    machine.driver.notify()

    assert [head for head, _ in queue.collect()] == heads
    assert len(machine.interrupts) == 1
    # index (twice), entries, descriptors, event, headers; statuses, event, ring, index
    assert machine.memory.calls == {"pread": 5 + 8, "transfer_in": 8, "pwrite": 8 + 3}


def test_block_request_cut_at_odd_places_is_the_same_request(machine: DiskMachine) -> None:
    """2.7.4: a driver may cut a request into descriptors anywhere."""
    queue = machine.up()
    data = pattern(512, seed=3)
    pieces, status = machine.request(T_OUT, 5)
    header = machine.memory.peek(16, pieces[0].gpa)
    machine.memory.poke(header + data, DATA)
    cuts = [Piece(DATA, 3), Piece(DATA + 3, 0), Piece(DATA + 3, 20), Piece(DATA + 23, 505)]

    queue.offer(queue.chain([*cuts, pieces[-1]]))
    machine.driver.notify()

    assert machine.memory.peek(1, status)[0] == S_OK
    assert machine.disk_bytes()[5 * 512 : 6 * 512] == data


def test_block_status_shares_a_descriptor_with_data(machine: DiskMachine) -> None:
    queue = machine.up()
    pieces, _ = machine.request(T_IN, 1)

    queue.offer(queue.chain([pieces[0], Piece(DATA, 513, True)]))
    machine.driver.notify()

    assert queue.collect() == [(0, 513)]
    assert machine.memory.peek(513, DATA) == machine.disk_bytes()[512:1024] + bytes([S_OK])


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
@pytest.mark.parametrize(
    ("sector", "size"),
    [(64, 512), (63, 1024), (1 << 63, 512), ((1 << 64) - 1, 512), (0, 511), (0, 513), (0, 33280)],
)
def test_block_transfer_off_the_disk_or_unaligned_is_ioerr(
    machine: DiskMachine, kind: int, sector: int, size: int
) -> None:
    queue = machine.up()
    before = machine.disk_bytes()

    status, _ = machine.do(queue, kind, sector, Piece(DATA, size, kind == T_IN))

    assert status == S_IOERR
    assert machine.disk_bytes() == before
    assert machine.memory.peek(size, DATA) == bytes(size)
    assert machine.block.statistics.errors == 1


def test_block_transfer_of_nothing_is_ok(machine: DiskMachine) -> None:
    queue = machine.up()

    assert machine.do(queue, T_IN, 64) == (S_OK, 1)
    assert machine.do(queue, T_OUT, 65)[0] == S_IOERR


def test_block_flush_is_counted(machine: DiskMachine) -> None:
    queue = machine.up()

    assert machine.do(queue, T_FLUSH, 0) == (S_OK, 1)
    assert machine.block.statistics.flushes == 1


def test_block_flush_that_fails_is_ioerr(
    machine: DiskMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = machine.up()
    monkeypatch.setattr(os, "fdatasync", lambda _fd: refuse(errno.EIO))

    assert machine.do(queue, T_FLUSH, 0)[0] == S_IOERR
    assert machine.block.statistics.flushes == 0
    assert machine.block.statistics.errors == 1


@pytest.mark.parametrize(("features", "synced"), [(0, 1), (F_FLUSH, 0)])
def test_block_write_is_synced_only_for_a_driver_that_cannot_flush(
    machine: DiskMachine, monkeypatch: pytest.MonkeyPatch, features: int, synced: int
) -> None:
    queue = machine.up(features)
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)

    machine.do(queue, T_OUT, 0, Piece(DATA, 512))

    assert len(calls) == synced


@pytest.mark.parametrize(("size", "expected"), [(20, b"mydisk" + bytes(14)), (3, b"myd")])
def test_block_get_id_answers_the_serial(
    make_machine: MakeMachine, size: int, expected: bytes
) -> None:
    machine = make_machine(options=",serial=mydisk")
    queue = machine.up()

    status, length = machine.do(queue, T_GET_ID, 0, Piece(DATA, size, True))

    assert (status, length) == (S_OK, size + 1)
    assert machine.memory.peek(size, DATA) == expected


def test_block_unknown_request_is_unsupported(machine: DiskMachine) -> None:
    queue = machine.up()

    assert machine.do(queue, 0x1234, 0, Piece(DATA, 512, True)) == (S_UNSUPP, 0)


def test_block_read_only_disk_refuses_changes(make_machine: MakeMachine) -> None:
    machine = make_machine(options=",ro", punch=punch_by_zeroes)
    before = machine.disk_bytes()
    queue = machine.up()
    machine.memory.poke(blk_range(0, 1), DATA)

    assert machine.driver.offered_features() & (F_RO | F_DISCARD | F_WRITE_ZEROES) == F_RO
    assert machine.do(queue, T_OUT, 0, Piece(DATA, 512))[0] == S_IOERR
    assert machine.do(queue, T_DISCARD, 0, Piece(DATA, 16))[0] == S_UNSUPP
    assert machine.do(queue, T_IN, 0, Piece(DATA, 512, True))[0] == S_OK
    assert machine.do(queue, T_FLUSH, 0)[0] == S_OK
    assert machine.disk_bytes() == before
    assert machine.memory.calls["transfer_out"] == 0


def test_block_read_past_a_file_that_shrank_is_ioerr(machine: DiskMachine) -> None:
    queue = machine.up()
    os.truncate(machine.path, 1024)

    status, length = machine.do(queue, T_IN, 1, Piece(DATA, 1024, True))

    assert (status, length) == (S_IOERR, 512)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_block_disk_error_is_ioerr_and_the_next_request_works(
    machine: DiskMachine, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    queue = machine.up()
    with monkeypatch.context() as patched:
        patched.setattr(machine.memory, "transfer_out", lambda *_: refuse(error))
        assert machine.do(queue, T_OUT, 0, Piece(DATA, 512))[0] == S_IOERR

    assert machine.do(queue, T_OUT, 0, Piece(DATA, 512))[0] == S_OK
    assert machine.block.statistics.errors == 1
    assert machine.driver.status & NEEDS_RESET == 0


def test_block_discard_punches_each_range(make_machine: MakeMachine) -> None:
    punched: list[tuple[int, int]] = []
    machine = make_machine(punch=lambda _fd, offset, size: punched.append((offset, size)))
    queue = machine.up()
    machine.memory.poke(blk_range(8, 8) + blk_range(32, 16) + blk_range(3, 0), DATA)

    status, _ = machine.do(queue, T_DISCARD, 0, Piece(DATA, 48))

    assert status == S_OK
    assert punched == [(4096, 4096), (16384, 8192)]


def test_block_discard_where_the_host_cannot_changes_nothing(make_machine: MakeMachine) -> None:
    machine = make_machine(punch=punch_not_supported)
    before = machine.disk_bytes()
    queue = machine.up()
    machine.memory.poke(blk_range(8, 8), DATA)

    assert machine.do(queue, T_DISCARD, 0, Piece(DATA, 16))[0] == S_OK
    assert machine.disk_bytes() == before


def test_block_discard_that_fails_is_ioerr(make_machine: MakeMachine) -> None:
    machine = make_machine(punch=lambda *_: refuse(errno.EIO))
    queue = machine.up()
    machine.memory.poke(blk_range(8, 8), DATA)

    assert machine.do(queue, T_DISCARD, 0, Piece(DATA, 16))[0] == S_IOERR


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
@pytest.mark.parametrize(
    ("ranges", "size", "expected"),
    [
        (blk_range(60, 5), 16, S_IOERR),
        (blk_range((1 << 64) - 1, 1), 16, S_IOERR),
        (blk_range(0, 0xFFFF_FFFF), 16, S_IOERR),
        (blk_range(0, 1), 15, S_IOERR),
        (b"", 0, S_IOERR),
        (blk_range(0, 1) * 17, 17 * 16, S_IOERR),
        (blk_range(0, 1, 2), 16, S_UNSUPP),
        (blk_range(0, 1, 0x8000_0001), 16, S_UNSUPP),
        (blk_range(64, 1, 4), 16, S_UNSUPP),
    ],
)
def test_block_bad_range_is_refused_and_changes_nothing(
    make_machine: MakeMachine, kind: int, ranges: bytes, size: int, expected: int
) -> None:
    machine = make_machine(punch=punch_by_zeroes)
    before = machine.disk_bytes()
    queue = machine.up()
    machine.memory.poke(ranges, DATA)

    status, _ = machine.do(queue, kind, 0, Piece(DATA, size))

    assert status == expected
    assert machine.disk_bytes() == before


@pytest.mark.parametrize(
    ("kind", "most"), [(T_DISCARD, MAX_DISCARD_SECTORS), (T_WRITE_ZEROES, MAX_ZERO_SECTORS)]
)
def test_block_range_longer_than_the_limit_is_ioerr(
    make_machine: MakeMachine, kind: int, most: int
) -> None:
    punched: list[int] = []
    machine = make_machine(
        sectors=2 * MAX_DISCARD_SECTORS, punch=lambda _fd, _offset, size: punched.append(size)
    )
    queue = machine.up()

    answers = []
    for count in (most, most + 1):
        machine.memory.poke(blk_range(0, count, kind == T_WRITE_ZEROES), DATA)
        answers.append(machine.do(queue, kind, 0, Piece(DATA, 16))[0])

    assert answers == [S_OK, S_IOERR]
    assert sum(punched) == 512 * most


def test_block_discard_with_one_bad_range_punches_none(make_machine: MakeMachine) -> None:
    machine = make_machine(punch=punch_by_zeroes)
    before = machine.disk_bytes()
    queue = machine.up()
    machine.memory.poke(blk_range(0, 1) + blk_range(64, 1), DATA)

    assert machine.do(queue, T_DISCARD, 0, Piece(DATA, 32))[0] == S_IOERR
    assert machine.disk_bytes() == before


@pytest.mark.parametrize("kind", [T_DISCARD, T_WRITE_ZEROES])
def test_block_range_request_that_was_not_negotiated_is_unsupported(
    make_machine: MakeMachine, kind: int
) -> None:
    machine = make_machine(punch=punch_by_zeroes)
    queue = machine.up(F_FLUSH)
    machine.memory.poke(blk_range(0, 1), DATA)

    assert machine.do(queue, kind, 0, Piece(DATA, 16))[0] == S_UNSUPP


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("punch", [None, punch_not_supported, punch_not_aligned, punch_by_zeroes])
def test_block_write_zeroes_leaves_zeroes_whatever_the_host_can(
    make_machine: MakeMachine, flags: int, punch: Callable[[int, int, int], None] | None
) -> None:
    machine = make_machine(sectors=2000, punch=punch)
    before = machine.disk_bytes()
    queue = machine.up()
    machine.memory.poke(blk_range(3, 1500, flags), DATA)

    assert machine.do(queue, T_WRITE_ZEROES, 0, Piece(DATA, 16))[0] == S_OK
    after = machine.disk_bytes()
    assert after == before[: 3 * 512] + bytes(1500 * 512) + before[1503 * 512 :]


def test_block_write_zeroes_without_unmap_keeps_the_blocks(make_machine: MakeMachine) -> None:
    punched: list[int] = []
    machine = make_machine(punch=lambda _fd, offset, _size: punched.append(offset))
    queue = machine.up()
    machine.memory.poke(blk_range(0, 8), DATA)

    machine.do(queue, T_WRITE_ZEROES, 0, Piece(DATA, 16))

    assert punched == []


@pytest.mark.parametrize("where", [DATA, 1 << 40, (1 << 20) - 512, (1 << 64) - 1024])
def test_block_data_in_memory_that_is_refused_stops_the_device(
    machine: DiskMachine, where: int
) -> None:
    queue = machine.up()
    machine.memory.private.append(Range(DATA + 512, 512))
    pieces, status = machine.request(T_IN, 0, Piece(where, 1024, True))

    queue.offer(queue.chain(pieces))
    machine.driver.notify()

    assert machine.driver.status & NEEDS_RESET
    assert machine.driver.isr() == 2
    assert machine.memory.peek(1, status) == b"\xee"
    assert machine.block.statistics.refused == 1
    assert machine.memory.peek(512, DATA) == bytes(512)


def test_block_requests_before_a_refused_one_are_returned(machine: DiskMachine) -> None:
    queue = machine.up()
    good, _ = machine.request(T_IN, 0, Piece(DATA, 512, True))
    bad, _ = machine.request(T_IN, 0, Piece(1 << 40, 512, True))

    queue.offer(queue.chain(good), queue.chain(bad))
    machine.driver.notify()

    assert queue.collect() == [(0, 513)]
    assert machine.driver.status & NEEDS_RESET


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(DATA, 15), Piece(DATA + 64, 1, True)],  # header cut off
        [Piece(DATA, 16)],  # nowhere to put the status
        [Piece(DATA + 64, 1, True)],  # no header
        [Piece(DATA, 0), Piece(DATA, 0, True)],
        [Piece(DATA, 16), Piece(DATA + 64, 0, True)],
    ],
)
def test_block_request_without_header_or_status_stops_the_device(
    machine: DiskMachine, pieces: list[Piece]
) -> None:
    queue = machine.up()

    queue.offer(queue.chain(pieces))
    machine.driver.notify()

    assert machine.driver.status & NEEDS_RESET
    assert queue.collect() == []
    assert machine.block.statistics.errors == 1


# -- turns: a batch as large as a guest likes must not keep the event loop from other work --------


def offer_reads(machine: DiskMachine, queue: VirtioQueueDriver, count: int) -> list[int]:
    """`count` reads of a sector each, all offered at once; their heads."""
    heads = [
        queue.chain(machine.request(T_IN, number, Piece(DATA + 512 * number, 512, True))[0])
        for number in range(count)
    ]
    queue.offer(*heads)
    return heads


def test_block_batch_beyond_a_turn_is_served_in_several(
    make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "TURN_BYTES", 1024)
    rung: list[int] = []
    machine = make_machine(ring=rung.append)
    queue = machine.up()
    heads = offer_reads(machine, queue, 5)
    turns = []

    machine.driver.notify()
    while rung:
        machine.transport.notify(rung.pop())
        turns.append([head for head, _ in queue.collect()])

    assert turns == [heads[0:2], heads[2:4], heads[4:5]]
    assert machine.memory.peek(5 * 512, DATA) == pattern(5 * 512)


def test_block_turn_that_ends_with_the_batch_asks_for_no_other(
    make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "TURN_BYTES", 1024)
    rung: list[int] = []
    machine = make_machine(ring=rung.append)
    queue = machine.up()
    offer_reads(machine, queue, 2)

    machine.transport.notify(0)

    assert len(queue.collect()) == 2
    assert rung == []


@pytest.mark.parametrize("batching", [False, True])
def test_block_patience_serves_what_comes_soon_without_a_notify(
    make_machine: MakeMachine, batching: bool
) -> None:
    rung: list[int] = []
    machine = make_machine(ring=rung.append, patience=3, batching=batching)
    queue = machine.up()
    first = offer_reads(machine, queue, 1)
    second: list[int] = []
    looks: list[str] = []

    def be_quicker_than_the_second_look(verb: str, gpa: int) -> None:
        if gpa == queue.avail and queue.used_index() == 1:
            looks.append(verb)
            if len(looks) == 2:
                second.extend(offer_reads(machine, queue, 1))

    machine.memory.before = be_quicker_than_the_second_look
    machine.transport.notify(0)

    assert second
    assert [head for head, _ in queue.collect()] == first + second


def test_block_out_of_patience_asks_for_a_notify(make_machine: MakeMachine) -> None:
    rung: list[int] = []
    machine = make_machine(ring=rung.append, patience=3)
    queue = machine.up()
    offer_reads(machine, queue, 1)

    machine.transport.notify(0)  # looks three times more

    assert rung == []
    assert queue.notify_event() == 1


def test_block_patience_beyond_a_turn_lets_others_have_theirs(make_machine: MakeMachine) -> None:
    rung: list[int] = []
    machine = make_machine(ring=rung.append, patience=LOOKS_AT_ONCE)
    queue = machine.up()
    offer_reads(machine, queue, 1)

    machine.transport.notify(0)

    assert rung == [0]
    assert queue.notify_event() == 0  # not yet
    machine.transport.notify(rung.pop())
    assert rung == []
    assert queue.notify_event() == 1


def test_block_notify_by_port_write_rings_and_moves_nothing_itself(
    make_machine: MakeMachine,
) -> None:
    rung: list[int] = []
    machine = make_machine(ring=rung.append)
    queue = machine.up()
    offer_reads(machine, queue, 1)

    machine.driver.notify(0)
    machine.driver.notify(1)  # there is no such queue

    assert rung == [0]
    assert queue.collect() == []
