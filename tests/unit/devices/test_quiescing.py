"""A guest that converts pages under a device's I/O, in both orders, with a backend that waits.

No clock decides anything: the backing stops half way through an access until the test opens its
gate, and the scheme stops half way through a conversion.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator
from typing import cast

import pytest

from tests.support.conversion import RecordingScheme, unshare
from tests.support.fake_memory import FakeMemory
from tests.support.memory import (
    SMALL_RAM,
    Background,
    GatedBacking,
    page,
    pages,
    pattern,
    told_when_waiting,
)
from tests.support.virtio_driver import NEEDS_RESET, Piece
from tests.support.virtio_machine import VirtioMachine
from vmm.conversion.transaction import Converter
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.devices.virtio.block import T_IN, VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Allow, Decision, Event, Policy, View

DATA = 40  # page number of the first buffer
SECTORS = 8  # a page
CONTENT = pattern(page(4))


class SlowDisk(GatedBacking):
    """Shared memory whose transfers with disks wait at a gate; rings and headers don't."""

    def pread(self, size: int, offset: int) -> bytes:
        return MemfdBacking.pread(self, size, offset)

    def peek(self, size: int, gpa: int) -> bytes:
        return os.pread(self.fd, size, gpa)

    def poke(self, data: bytes, gpa: int) -> None:
        os.pwrite(self.fd, data, gpa)


class Race:
    """A disk of two queues on guest memory, and a converter for the same memory."""

    def __init__(self) -> None:
        self.backing = SlowDisk(page(64))
        self.memory = GuestMemory(SMALL_RAM, self.backing, MemfdBacking(page(64)))
        fd = os.memfd_create("disk")
        os.pwrite(fd, CONTENT, 0)
        self.disk = VirtioBlock(DiskFile(fd, "disk", 4 * SECTORS, False, b"", queues=2))
        self.machine = VirtioMachine(self.disk, memory=cast(FakeMemory, _Guest(self)))
        self.scheme = RecordingScheme(self.memory)
        self.machine.up()

    def converter(self, *policies: Policy, timeout: float = threading.TIMEOUT_MAX) -> Converter:
        return Converter(self.memory, self.scheme, *policies, quiesce_timeout=timeout)

    def request(self, queue: int, number: int) -> int:
        """A read of a page into page `number`; where its status will be."""
        header, status = page(32 + queue), page(34 + queue)
        self.backing.poke(struct.pack("<IIQ", T_IN, 0, 0), header)
        self.backing.poke(b"\xee", status)
        self.machine.give(
            queue, Piece(header, 16), Piece(page(number), 4096, True), Piece(status, 1, True)
        )
        return status

    def serve(self, queue: int) -> Background:
        return Background(lambda: self.machine.transport.notify(queue))

    def state(self, number: int) -> PageState:
        ((_, state),) = self.memory.states(pages(number, 1))
        return state

    def close(self) -> None:
        self.backing.gate.set()
        self.machine.close()
        self.memory.close()


class _Guest:
    """GuestMemory with the guest's own accesses, for the driver."""

    def __init__(self, race: Race) -> None:
        self._race = race
        self.size = page(64)
        for name in ("pread", "pwrite", "transfer_in", "transfer_out", "discard"):
            setattr(self, name, getattr(race.memory, name))
        self.peek, self.poke = race.backing.peek, race.backing.poke

    def close(self) -> None:
        """The race closes it."""


@pytest.fixture
def race() -> Iterator[Race]:
    made = Race()
    yield made
    made.close()


def test_unshare_waits_for_the_disk_that_is_at_its_pages(race: Race) -> None:
    status = race.request(0, DATA)
    serving = race.serve(0)
    race.backing.await_arrivals()
    waiting = told_when_waiting(race.memory)

    converting = Background(lambda: race.converter().convert(unshare(DATA, 1)))
    assert waiting.wait(30)
    assert race.scheme.calls == []  # nothing is applied while the disk is at it

    race.backing.gate.set()
    serving.result()
    assert converting.result() == 0
    assert race.backing.peek(1, status) == b"\0"
    assert race.state(DATA) is PageState.PRIVATE
    assert race.backing.peek(4096, page(DATA)) == bytes(4096)  # discarded after it was written
    assert not race.machine.driver.status & NEEDS_RESET


@pytest.mark.parametrize("by_policy", [False, True])
def test_unshare_that_will_not_wait_fails_and_the_disk_goes_on(race: Race, by_policy: bool) -> None:
    class Impatient(Policy):
        def on_unshare(self, event: Event, view: View) -> Decision:
            return Allow(patience=0)

    converter = race.converter(Impatient()) if by_policy else race.converter(timeout=0)
    status = race.request(0, DATA)
    serving = race.serve(0)
    race.backing.await_arrivals()

    assert converter.convert(unshare(DATA, 1)) == -errno.EBUSY

    assert race.scheme.calls == []
    assert race.state(DATA) is PageState.SHARED
    assert converter.accounting.of(Kind.UNSHARE).failed == 1
    race.backing.gate.set()
    serving.result()
    assert race.backing.peek(1, status) == b"\0"
    assert race.backing.peek(4096, page(DATA)) == CONTENT[:4096]
    assert converter.convert(unshare(DATA, 1)) == 0


def test_disk_that_comes_second_is_refused_and_counted(race: Race) -> None:
    """The other order: the conversion is half way through when the device gets there."""
    race.backing.gate.set()
    half_way, go_on = threading.Event(), threading.Event()

    def stop_half_way(area: Range, kind: Kind) -> None:
        half_way.set()
        assert go_on.wait(30)

    race.scheme.before_apply = stop_half_way
    status = race.request(0, DATA)
    converting = Background(lambda: race.converter().convert(unshare(DATA, 1)))
    assert half_way.wait(30)
    assert race.state(DATA) is PageState.CONVERTING

    race.serve(0).result()

    assert race.machine.driver.status & NEEDS_RESET
    assert race.disk.statistics.refused == 1
    assert race.disk.statistics.bytes_read == 0
    assert race.backing.peek(1, status) == b"\xee"
    go_on.set()
    assert converting.result() == 0
    assert race.backing.peek(4096, page(DATA)) == bytes(4096)


def test_disk_goes_on_with_other_pages_while_a_conversion_waits(race: Race) -> None:
    first, second = race.request(0, DATA), race.request(1, DATA + 1)
    serving = race.serve(0)
    race.backing.await_arrivals()
    waiting = told_when_waiting(race.memory)
    converting = Background(lambda: race.converter().convert(unshare(DATA, 1)))
    assert waiting.wait(30)

    other = race.serve(1)
    race.backing.await_arrivals()  # it got through to the disk, past the conversion

    race.backing.gate.set()
    for each in (serving, other):
        each.result()
    assert converting.result() == 0
    assert race.backing.peek(1, first) == race.backing.peek(1, second) == b"\0"
    assert race.backing.peek(4096, page(DATA + 1)) == CONTENT[:4096]


def test_reset_waits_for_the_queues_that_are_at_guest_memory(race: Race) -> None:
    status = race.request(1, DATA)
    serving = race.serve(1)
    race.backing.await_arrivals()
    resets = threading.Event()
    statuses: list[bytes] = []
    halt, reset = race.machine.transport._halt, race.disk.reset

    def about_to_reset() -> None:
        resets.set()
        halt()

    def note_status() -> None:
        statuses.append(race.backing.peek(1, status))
        reset()

    race.machine.transport._halt = about_to_reset  # type: ignore[method-assign]
    race.disk.reset = note_status  # type: ignore[method-assign]
    resetting = Background(lambda: setattr(race.machine.driver, "status", 0))
    assert resets.wait(30)

    race.backing.gate.set()
    serving.result()
    resetting.result()
    assert statuses == [b"\0"]  # the request was answered before the device was reset


def test_queue_that_breaks_does_not_pull_memory_from_under_another(race: Race) -> None:
    status = race.request(0, DATA)
    serving = race.serve(0)
    race.backing.await_arrivals()
    race.machine.give(1, Piece(0, 3))  # no request at all

    breaking = race.serve(1)
    race.backing.gate.set()
    breaking.result()
    serving.result()

    assert race.machine.driver.status & NEEDS_RESET
    assert race.backing.peek(1, status) == b"\0"
