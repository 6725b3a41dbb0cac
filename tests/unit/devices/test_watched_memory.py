"""Accesses of a device, announced before they happen, with what names their range."""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.disk_machine import MakeMachine
from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import NEEDS_RESET, Piece, VirtioQueueDriver
from vmm.core.errors import AccessDenied
from vmm.core.ranges import Range
from vmm.devices.virtio import watched
from vmm.devices.virtio.block import T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES
from vmm.devices.virtio.device import GuestMemory
from vmm.devices.virtio.queue import F_INDIRECT_DESC
from vmm.devices.virtio.watched import WatchedMemory, WatchedQueue

RINGS, DATA, OTHER = 0x1000, 0x10000, 0x20000


class Watch:
    """A device with one queue of 8; notes what is announced, or refuses."""

    def __init__(self, memory: FakeMemory) -> None:
        self.memory = memory
        self.refuse = False
        self.seen: list[tuple[int, int, bool, str | None]] = []
        self.watched = WatchedMemory(memory, self.announce)
        self.driver = VirtioQueueDriver(memory, RINGS, 8)
        self.queue = self.make_queue()

    def announce(self, area: Range, is_write: bool, named: str | None) -> None:
        self.seen.append((*area, is_write, named))
        if self.refuse:
            raise AccessDenied("no")

    def make_queue(self) -> WatchedQueue:
        driver = self.driver
        return self.watched.queue(
            self.watched, 8, driver.desc, driver.avail, driver.used, F_INDIRECT_DESC
        )

    def offer(self, *pieces: Piece) -> int:
        head = self.driver.chain(list(pieces))
        self.driver.offer(head)
        return head

    def name_of_read(self, gpa: int, size: int) -> str | None:
        self.watched.pread(size, gpa)
        return self.seen[-1][3]

    def name_of_write(self, gpa: int, size: int) -> str | None:
        self.watched.pwrite(bytes(size), gpa)
        return self.seen[-1][3]


@pytest.fixture
def watch() -> Iterator[Watch]:
    memory = FakeMemory()
    yield Watch(memory)
    memory.close()


def test_queues_own_accesses_are_named_by_its_rings(watch: Watch) -> None:
    head = watch.offer(Piece(DATA, 16))

    watch.queue.take()
    watch.queue.publish([(head, 0)])

    assert {named for *_, named in watch.seen} == {"ring"}
    assert {is_write for _, _, is_write, _ in watch.seen} == {True, False}


def test_buffers_are_named_in_their_direction_while_the_request_is_held(watch: Watch) -> None:
    head = watch.offer(Piece(DATA, 16), Piece(DATA + 0x100, 32, True))
    assert watch.name_of_read(DATA, 16) is None

    watch.queue.take()

    assert watch.name_of_read(DATA + 4, 12) == "descriptor"
    assert watch.name_of_write(DATA, 16) is None
    assert watch.name_of_write(DATA + 0x100, 32) == "descriptor"
    assert watch.name_of_write(DATA + 0x100, 33) is None
    assert watch.name_of_read(DATA + 0x100, 4) is None
    watch.queue.publish([(head, 32)])
    assert watch.name_of_read(DATA, 16) is None


def test_neighbouring_buffers_name_a_range_across_both(watch: Watch) -> None:
    watch.offer(Piece(DATA + 0x100, 0x100), Piece(DATA, 0x100), Piece(DATA + 0x280, 0x10))
    watch.queue.take()

    assert watch.name_of_read(DATA, 0x200) == "descriptor"
    assert watch.name_of_read(DATA + 0x80, 0x100) == "descriptor"
    assert watch.name_of_read(DATA + 0x80, 0x204) is None


def test_request_that_was_put_back_names_nothing(watch: Watch) -> None:
    watch.offer(Piece(DATA, 16))
    watch.offer(Piece(OTHER, 16))
    watch.queue.take()

    watch.queue.put_back(1)

    assert watch.name_of_read(DATA, 16) == "descriptor"
    assert watch.name_of_read(OTHER, 16) is None


def test_table_of_an_indirect_descriptor_is_named_by_it(watch: Watch) -> None:
    watch.memory.poke(watch.memory.peek(16, watch.driver.desc), OTHER)
    watch.driver.descriptor(0, OTHER, 16, 4, 0)  # VIRTQ_DESC_F_INDIRECT
    watch.driver.offer(0)

    watch.queue.take()

    assert (OTHER, 16, False, "descriptor") in watch.seen


def test_queue_that_a_reset_dropped_names_nothing_any_more(watch: Watch) -> None:
    watch.offer(Piece(DATA, 16))
    watch.queue.take()

    watch.queue = watch.make_queue()

    assert watch.name_of_read(DATA, 16) is None


@pytest.mark.parametrize(
    "access",
    [
        lambda memory: memory.pread(16, DATA),
        lambda memory: memory.pwrite(b"x", DATA),
        lambda memory: memory.transfer_in(0, 0, DATA, 16),
        lambda memory: memory.transfer_out(DATA, 16, 1, 0),
    ],
)
def test_refused_access_does_not_happen(
    watch: Watch, access: Callable[[WatchedMemory], object]
) -> None:
    watch.refuse = True

    with pytest.raises(AccessDenied):
        access(watch.watched)

    assert not watch.memory.calls


def test_every_verb_of_guest_memory_is_watched() -> None:
    verbs = {name for name, _ in inspect.getmembers(GuestMemory, inspect.isfunction)}

    assert {name for name in verbs if not name.startswith("_")} <= set(vars(WatchedMemory))


def test_disk_touches_only_what_rings_and_descriptors_name(make_machine: MakeMachine) -> None:
    seen: set[str | None] = set()
    machine = make_machine(announce=lambda area, is_write, named: seen.add(named))
    queue = machine.up()

    machine.do(queue, T_IN, 0, Piece(DATA, 1024, True), Piece(DATA + 1024, 512, True))
    machine.do(queue, T_OUT, 8, Piece(DATA, 512), Piece(DATA + 0x2000, 512))
    machine.do(queue, T_GET_ID, 0, Piece(DATA, 20, True))
    machine.do(queue, T_WRITE_ZEROES, 0, Piece(DATA + 0x4000, 16))

    assert seen == {"ring", "descriptor"}


def test_device_that_may_not_touch_its_data_needs_a_reset(make_machine: MakeMachine) -> None:
    def announce(area: Range, is_write: bool, named: str | None) -> None:
        if area.start >= DATA:
            raise AccessDenied("no data")

    machine = make_machine(announce=announce)
    queue = machine.up()
    pieces, _ = machine.request(T_IN, 0, Piece(DATA, 512, True))

    queue.offer(queue.chain(pieces))
    machine.driver.notify()

    assert machine.driver.status & NEEDS_RESET
    assert machine.block.statistics.refused == 1
    assert machine.memory.peek(512, DATA) == bytes(512)


def test_naming_asks_the_request_at_hand_first(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a second a touch it was, where the guest had 262,144 buffers held."""
    joined = 0
    real = watched._joined

    def counted(segments: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        nonlocal joined
        joined += len(segments)
        return real(segments)

    monkeypatch.setattr(watched, "_joined", counted)
    for head in range(8):
        table = b"".join(
            struct.pack("<QIHH", DATA + 4096 * head + 2 * i, 1, 1 if i < 199 else 0, i + 1)
            for i in range(200)
        )
        watch.memory.poke(table, OTHER + 4096 * head)
        watch.driver.descriptor(head, OTHER + 4096 * head, len(table), 4, 0)
    watch.driver.offer(*range(8))
    assert len(watch.queue.take()) == 8

    names = [watch.name_of_read(DATA + 4096 * 7 + 2 * i, 1) for i in range(200)]

    assert set(names) == {"descriptor"}
    assert joined <= 8 * 200  # each request's buffers once, not once for every touch


def test_naming_follows_the_device_from_request_to_request(watch: Watch) -> None:
    heads = [watch.offer(Piece(DATA + 0x1000 * i, 16)) for i in range(3)]
    watch.queue.take()

    names = [watch.name_of_read(DATA + 0x1000 * i, 16) for i in (2, 0, 1)]
    watch.queue.publish([(heads[1], 0)])
    names.append(watch.name_of_read(DATA + 0x1000, 16))

    assert names == ["descriptor"] * 3 + [None]
