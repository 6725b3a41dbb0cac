"""What one turn of a disk may cost, and that a request cut into steps keeps its one answer."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.disk_machine import pattern
from tests.support.fake_memory import BatchingFakeMemory, FakeMemory
from tests.support.virtio_driver import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, NEEDS_RESET
from tests.support.virtio_machine import VirtioMachine
from vmm.core.ranges import Range
from vmm.devices.virtio.block import F_FLUSH, PUNCH_AT_ONCE, VirtioBlock
from vmm.devices.virtio.block_file import ReadAhead, open_disk
from vmm.devices.virtio.budget import TURN_BYTES, TURN_CALLS, Pace

T_IN, T_OUT, T_FLUSH, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 11, 13
MIB = 1 << 20


class CountingMemory(BatchingFakeMemory):
    """Transfers move nothing but count: the largest, and how many bytes they were."""

    def __init__(self) -> None:
        super().__init__(64 * MIB)
        self.moved = self.largest = self.transfers = 0

    def _note(self, size: int) -> int:
        self.transfers += 1
        self.moved += size
        self.largest = max(self.largest, size)
        return size

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        self._check("transfer_in", size, gpa)
        return self._note(size)

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        self._check("transfer_out", size, gpa)
        return self._note(size)

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        return self._note(sum(moves[2::3]))


class Disk:
    """A machine with a disk of 8 GiB that holds nothing, whose system calls are counted."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, refuse: int = 0) -> None:
        path.touch()
        os.truncate(path, 8 << 30)
        self.punched: list[tuple[int, int]] = []
        self.zeroes = self.syncs = 0
        self.memory = CountingMemory()
        self.device = device = VirtioBlock(
            open_disk(str(path)), lambda _fd, *area: self.punched.append(area)
        )
        self.machine = VirtioMachine(device, memory=self.memory)
        self.machine.up(size=256, refuse=refuse)
        self.queue = self.machine.queues[0]
        disk, pwrite = device._disk.fd, os.pwrite

        def counted(fd: int, data: Any, offset: int) -> int:
            if fd != disk:
                return pwrite(fd, data, offset)
            self.zeroes += len(data)
            return len(data)

        def sync(fd: int) -> None:
            self.syncs += 1

        patch.setattr(os, "pwrite", counted)
        patch.setattr(os, "fdatasync", sync)

    def offer(self, kind: int, body: list[tuple[int, int, int]], times: int = 1) -> int:
        """The same request in an indirect table, so often; where its status byte is."""
        machine = self.machine
        header = machine.place(struct.pack("<IIQ", kind, 0, 0))
        status = machine.blank(1).gpa
        rows = [(header.gpa, 16, 0), *body, (status, 1, DESC_WRITE)]
        table = b"".join(
            struct.pack("<QIHH", gpa, size, flags | (DESC_NEXT if i + 1 < len(rows) else 0), i + 1)
            for i, (gpa, size, flags) in enumerate(rows)
        )
        at = machine.place(table).gpa
        for i in range(times):
            self.queue.descriptor(i, at, len(table), DESC_INDIRECT, 0)
        self.queue.offer(*range(times))
        return status

    def turn(self) -> bool:
        """One turn; whether the device asks for another one."""
        self.machine.rung.clear()
        self.machine.transport.notify(0)
        return bool(self.machine.rung)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", monkeypatch)
    yield made
    monkeypatch.undo()
    made.machine.close()


def zero_range(disk: Disk, sectors: int, flags: int = 0) -> list[tuple[int, int, int]]:
    return [(disk.machine.place(struct.pack("<QII", 0, sectors, flags)).gpa, 16, 0)]


def test_disk_turn_of_write_zeroes_writes_a_turns_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 requests of 32 MiB in one turn were 8 GiB and 256 syncs."""
    disk = Disk(tmp_path / "disk", monkeypatch, refuse=F_FLUSH)
    disk.offer(T_WRITE_ZEROES, zero_range(disk, 1 << 16), times=256)

    assert disk.turn()
    assert disk.zeroes <= TURN_BYTES + (1 << 18)
    assert disk.queue.used_index() == 0
    while disk.queue.used_index() == 0:
        assert disk.turn()

    assert disk.queue.collect() == [(0, 1)]  # the answer comes once, at the end
    assert disk.syncs == 1
    assert 32 * MIB <= disk.zeroes <= 32 * MIB + TURN_BYTES
    monkeypatch.undo()
    disk.machine.close()


@pytest.mark.parametrize("kind", [T_IN, T_OUT])
def test_disk_request_of_gigabytes_is_moved_in_bounded_pieces(disk: Disk, kind: int) -> None:
    """One read of 4 GiB was one turn, in which no conversion of its pages went through."""
    flags = DESC_WRITE if kind == T_IN else 0
    status = disk.offer(kind, [(32 * MIB, 32 * MIB, flags)] * 32)

    turns = 1
    while disk.turn():
        turns += 1
        assert disk.memory.largest <= Pace.MOST

    assert disk.memory.moved == 1024 * MIB
    assert turns >= 1024 * MIB // (TURN_BYTES + Pace.MOST)
    used = 1024 * MIB + 1 if kind == T_IN else 1
    assert disk.queue.collect() == [(0, used)]
    assert disk.memory.peek(1, status) == b"\0"


def test_disk_request_that_ends_on_a_private_page_stops_in_the_middle(disk: Disk) -> None:
    disk.offer(T_IN, [(32 * MIB, 32 * MIB, DESC_WRITE)] * 32)
    assert disk.turn()
    disk.memory.private.append(Range(48 * MIB, 4096))

    disk.machine.settle()

    assert disk.machine.driver.status & NEEDS_RESET
    assert disk.queue.used_index() == 0


def test_disk_reset_in_the_middle_of_a_request_forgets_it(disk: Disk) -> None:
    disk.offer(T_IN, [(32 * MIB, 32 * MIB, DESC_WRITE)] * 32)
    assert disk.turn()
    moved = disk.memory.moved

    disk.machine.up(size=256)
    disk.machine.settle()

    assert disk.memory.moved == moved


def test_disk_requests_behind_a_long_one_keep_their_order(disk: Disk) -> None:
    disk.offer(T_IN, [(32 * MIB, 32 * MIB, DESC_WRITE)] * 2)
    disk.queue.descriptor(1, *struct.unpack("<QIHH", disk.memory.peek(16, disk.queue.desc)))
    disk.queue.offer(1)

    disk.machine.kick(0)

    assert disk.queue.collect() == [(0, 64 * MIB + 1), (1, 64 * MIB + 1)]


def test_disk_discard_of_gigabytes_is_punched_in_pieces(disk: Disk) -> None:
    place = disk.machine.place(struct.pack("<QII", 1, 1 << 22, 0))
    disk.offer(T_DISCARD, [(place.gpa, 16, 0)])

    disk.machine.kick(0)

    assert max(size for _, size in disk.punched) == PUNCH_AT_ONCE
    assert sum(size for _, size in disk.punched) == 2 << 30
    assert disk.punched[0] == (512, PUNCH_AT_ONCE - 512)
    assert disk.queue.collect() == [(0, 1)]


def test_disk_flushes_that_take_long_are_one_a_turn(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def slow_sync(fd: int) -> None:
        nonlocal now
        disk.syncs += 1
        now += 1.0

    queue = disk.machine.device._queues[0]
    monkeypatch.setattr(queue.budget, "_clock", lambda: now)
    monkeypatch.setattr(os, "fdatasync", slow_sync)
    disk.offer(T_FLUSH, [], times=256)
    queue.budget.begin()

    assert disk.turn()
    assert disk.syncs == 1
    assert disk.turn()
    assert disk.syncs == 2


def test_disk_turn_reads_a_bounded_number_of_descriptors(disk: Disk) -> None:
    """256 chains with 1,000 descriptors each, which are read before anything is done."""
    disk.offer(T_IN, [(32 * MIB + 1024 * i, 512, DESC_WRITE) for i in range(1000)], times=256)

    disk.turn()

    assert disk.memory.calls["pread"] < TURN_CALLS
    assert disk.memory.transfers < 2 * TURN_CALLS
    assert 0 < disk.queue.used_index() < 20


def test_disk_signal_during_a_long_request_is_handled_between_two_pieces(disk: Disk) -> None:
    """Its handler ran when the whole request was done, seconds later."""
    moved_then: list[int] = []
    transfer = disk.memory.transfer_in

    def interrupted(src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        if disk.memory.transfers == 2:
            signal.raise_signal(signal.SIGUSR2)
        return transfer(src_fd, src_offset, gpa, size)

    disk.memory.transfer_in = interrupted  # type: ignore[method-assign]
    former = signal.signal(signal.SIGUSR2, lambda *_: moved_then.append(disk.memory.moved))
    disk.offer(T_IN, [(32 * MIB, 32 * MIB, DESC_WRITE)] * 32)

    disk.machine.kick(0)
    signal.signal(signal.SIGUSR2, former)

    assert len(moved_then) == 1
    assert moved_then[0] <= 3 * Pace.MOST
    assert disk.memory.largest <= Pace.MOST


def test_disk_slow_host_gets_less_with_each_call(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def slow(size: int) -> int:
        nonlocal now
        now += size / MIB  # a second a MiB
        return CountingMemory._note(disk.memory, size)

    monkeypatch.setattr(disk.memory, "_note", slow)
    monkeypatch.setattr("vmm.devices.virtio.block.time.monotonic", lambda: now)
    disk.offer(T_IN, [(32 * MIB, 32 * MIB, DESC_WRITE)])
    for _ in range(40):
        disk.turn()
    before = disk.memory.moved

    disk.turn()

    assert disk.memory.moved - before <= TURN_BYTES
    assert disk.device._pace.limit == Pace.LEAST


def test_disk_slow_piece_has_the_place_behind_it_looked_at(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looked = 0.0, []

    def slow(size: int) -> int:
        nonlocal now
        now += 1.0
        return CountingMemory._note(disk.memory, size)

    monkeypatch.setattr(disk.memory, "_note", slow)
    monkeypatch.setattr("vmm.devices.virtio.block.time.monotonic", lambda: now)
    monkeypatch.setattr(ReadAhead, "look", lambda _, end: looked.append(end))
    disk.offer(T_IN, [(32 * MIB, 32 * MIB, DESC_WRITE)])

    disk.turn()

    assert looked[0] == MIB


def test_disk_data_of_a_long_request_is_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real bytes, a turn of 64 KiB: nothing is moved twice, nothing left out."""
    path = tmp_path / "disk"
    path.write_bytes(pattern(512 * 1024))
    monkeypatch.setattr("vmm.devices.virtio.budget.TURN_BYTES", 64 << 10)
    device = VirtioBlock(open_disk(str(path)))
    device._pace.limit = 24 << 10
    machine = VirtioMachine(device, memory=FakeMemory(2 * MIB))
    monkeypatch.setattr(Pace, "took", lambda *_: None)
    monkeypatch.setattr(Pace, "LEAST", 512)
    machine.up()
    header = machine.place(struct.pack("<IIQ", 0, 0, 0))
    data = machine.blank(512 * 1000)
    head = machine.give(0, header, data, machine.blank(1))

    turns = 0
    while machine.queues[0].used_index() == 0:
        machine.transport.notify(0)
        turns += 1

    assert machine.text(data, 512 * 1000) == pattern(512 * 1000)
    assert machine.queues[0].collect() == [(head, 512 * 1000 + 1)]
    assert turns > 5
    machine.close()
