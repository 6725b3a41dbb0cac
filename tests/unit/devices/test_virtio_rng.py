"""virtio-rng from the guest's side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.virtio_driver import NEEDS_RESET, Piece
from tests.support.virtio_machine import VirtioMachine
from vmm.core.ranges import Range
from vmm.devices.virtio import rng
from vmm.devices.virtio.rng import VirtioRng


@pytest.fixture
def machine() -> Iterator[VirtioMachine]:
    made = VirtioMachine(VirtioRng())
    yield made
    made.close()


def test_rng_fills_a_buffer_in_pieces(machine: VirtioMachine) -> None:
    machine.up()
    first, second = machine.blank(64), machine.blank(100)
    head = machine.give(0, first, second)

    machine.kick(0)

    assert machine.queues[0].collect() == [(head, 164)]
    filled = machine.text(first, 64) + machine.text(second, 100)
    assert len(set(filled)) > 40  # 164 random bytes
    assert machine.interrupts == 1
    assert machine.device.statistics.bytes_read == 164


def test_rng_gives_a_huge_buffer_a_part(machine: VirtioMachine) -> None:
    machine.up()
    machine.give(0, Piece(0x40000, 0x80000, True))

    machine.kick(0)

    ((_, length),) = machine.queues[0].collect()
    assert length == rng.MOST_BYTES
    assert machine.memory.peek(16, 0x40000 + rng.MOST_BYTES) == bytes(16)


def test_rng_buffer_that_cannot_be_written_comes_back_empty(machine: VirtioMachine) -> None:
    machine.up()
    head = machine.give(0, machine.place(b"read only"))

    machine.kick(0)

    assert machine.queues[0].collect() == [(head, 0)]


def test_rng_private_buffer_stops_the_device_and_is_counted(machine: VirtioMachine) -> None:
    machine.up()
    good, bad = machine.blank(16), machine.blank(16)
    machine.memory.private.append(Range(bad.gpa & ~4095, 8192))
    bad.gpa = (bad.gpa & ~4095) + 4096
    good.gpa = 0x80000
    head = machine.give(0, good)
    machine.give(0, bad)

    machine.kick(0)

    assert machine.queues[0].collect() == [(head, 16)]
    assert machine.driver.status & NEEDS_RESET
    assert machine.device.statistics.refused == 1
