"""What a device's process asks for, and how often: by a channel that answers from memory."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tests.support.fake_memory import BatchingFakeMemory
from tests.support.virtio_driver import Piece, VirtioQueueDriver
from vmm.core.ranges import Range
from vmm.devices.process import protocol
from vmm.devices.process.protocol import words
from vmm.devices.process.remote_memory import (
    Channel,
    Redo,
    RemoteBatches,
    RemoteQueue,
    looks_with,
)
from vmm.devices.virtio.queue import F_EVENT_IDX

RING, HEADERS = [0x1000, 8], [0x2000, 16, 0x3000, 16]
OTHERS = [0x4000, 16]


class Answering:
    """A channel to a memory; notes what is asked for."""

    def __init__(self) -> None:
        self.memory = BatchingFakeMemory()
        self.asked: list[tuple[int, list[int]]] = []
        self.moved: int | None = None
        self.returned: list[int] = []  # the flags of each RETURN

    def ask(self, what: int, number: int, body: bytes, flags: int = 0) -> memoryview:
        view = memoryview(body)
        if what == protocol.RETURN:
            self.returned.append(flags)
            known = protocol.returned_in(view).known.to_bytes(2, "little")
            return memoryview(b"\0\0" + 2 * known)  # nothing new, and a notify was asked for
        if what == protocol.READ:
            pieces = protocol.pieces_in(view)
            self.asked.append((what, pieces))
            return memoryview(self.memory.read_many(pieces))
        if what == protocol.WRITE:
            moves, pieces, then, data = protocol.write_in(view)
            self.asked.append((what, moves.cast("Q").tolist()))
            self.memory.write_many(pieces, bytes(data))
            return memoryview(self.memory.read_many(then) if then else b"")
        moves_asked = protocol.moves_in(view, 0, 1 << 40, False)
        self.asked.append((what, moves_asked))
        moved = sum(moves_asked[2::3]) if self.moved is None else self.moved
        return memoryview(protocol.MOVED.pack(moved))


@pytest.fixture
def channel() -> Iterator[Answering]:
    made = Answering()
    made.memory.poke(b"ring....", 0x1000)
    made.memory.poke(b"header of the 1st", 0x2000)
    made.memory.poke(b"header of the 2nd", 0x3000)
    yield made
    made.memory.close()


def batches(
    channel: Answering,
    *,
    keeps: bool = False,
    guesses: bool = True,
    kicked: set[int] | None = None,
) -> RemoteBatches:
    return RemoteBatches(
        cast(Channel, cast(Any, channel)),
        {5: 0},
        may_keep=keeps,
        may_guess=guesses,
        counts=lambda: bytes(protocol.COUNTS.size),
        kicked=set() if kicked is None else kicked,
    )


def test_look_brings_what_was_read_after_the_last_one(channel: Answering) -> None:
    memory = batches(channel)
    first = memory.read_many(HEADERS)

    ring = memory.look(RING)
    again = memory.read_many(HEADERS)

    assert ring == b"ring...."
    assert again == first == b"header of the 1sheader of the 2n"
    assert [pieces for _, pieces in channel.asked] == [HEADERS, RING + HEADERS]


def test_guess_is_good_for_once_and_until_the_turn_ends(channel: Answering) -> None:
    memory = batches(channel)
    memory.read_many(HEADERS)

    memory.look(RING)
    memory.read_many(HEADERS)
    channel.memory.poke(b"news", 0x2000)
    assert memory.read_many(HEADERS)[:4] == b"news"
    memory.look(RING)
    channel.memory.poke(b"more", 0x2000)
    memory.begin()
    assert memory.read_many(HEADERS)[:4] == b"more"


def test_guess_that_is_refused_costs_another_look(channel: Answering) -> None:
    memory = batches(channel)
    memory.read_many(HEADERS)
    channel.memory.private.append(Range(0x2000, 16))

    assert memory.look(RING) == b"ring...."
    assert memory.look(RING) == b"ring...."

    looks = [pieces for _, pieces in channel.asked][1:]
    assert looks == [RING + HEADERS, RING, RING]


def test_guesses_that_are_wrong_end_until_one_would_be_right(channel: Answering) -> None:
    memory = batches(channel)
    for pieces in (HEADERS, OTHERS) * 5:
        memory.look(RING)
        memory.read_many(pieces)
    assert channel.asked[-2] == (protocol.READ, RING)

    memory.read_many(OTHERS)
    memory.look(RING)

    assert channel.asked[-1] == (protocol.READ, RING + OTHERS)


def test_memory_that_tells_of_refusals_is_not_guessed_at(channel: Answering) -> None:
    memory = batches(channel, guesses=False)
    memory.read_many(HEADERS)

    memory.look(RING)

    assert channel.asked[-1] == (protocol.READ, RING)


def test_moves_are_kept_for_what_is_written_next(channel: Answering) -> None:
    memory = batches(channel, keeps=True)
    memory.begin()

    assert memory.move_in(5, [0, 0x5000, 512]) == 512
    assert channel.asked == []
    memory.write_many([0x6000, 2], b"ok")

    assert channel.asked == [(protocol.WRITE, [0, 0x5000, 512])]


def test_moves_come_before_whatever_else_is_asked_for(channel: Answering) -> None:
    memory = batches(channel, keeps=True)
    memory.begin()
    memory.move_in(5, [0, 0x5000, 512])

    memory.read_many(HEADERS)

    assert [what for what, _ in channel.asked] == [protocol.MOVE_IN, protocol.READ]


def test_moves_are_made_at_once_where_they_may_not_be_kept(channel: Answering) -> None:
    """For a driver that can't flush: the disk sees to its writes when they have been moved."""
    memory = batches(channel)
    memory.begin()

    memory.move_in(5, [0, 0x5000, 512])

    assert [what for what, _ in channel.asked] == [protocol.MOVE_IN]


def test_kept_moves_that_do_nothing_have_the_turn_done_again(channel: Answering) -> None:
    memory = batches(channel, keeps=True)
    memory.begin()
    memory.move_in(5, [0, 0x5000, 512])
    channel.moved = 0

    with pytest.raises(Redo):
        memory.end()

    memory.begin()
    assert memory.move_in(5, [0, 0x5000, 512]) == 0  # step by step, as it is


def test_kick_from_before_an_answer_brings_nothing() -> None:
    """By the answer the process may have gone on already, behind what was in the rings then."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        channel = Channel(near)
        kick = protocol.HEAD.pack(protocol.KICK, 0, 1, 0)
        far.send(kick + b"older rings")
        far.send(protocol.HEAD.pack(protocol.ANSWER, protocol.OK, 0, 0) + b"rings")

        answer = bytes(channel.ask(protocol.READ, 0, words(RING)))

    assert answer == b"rings"
    assert channel.backlog == [kick]


def test_process_rests_with_the_last_chain_that_was_under_way(channel: Answering) -> None:
    """Before, something is for it to do yet, and it may not be silent about that."""
    kicked = {3}
    driver = VirtioQueueDriver(channel.memory, 0x8000, 16)
    addresses = driver.desc, driver.avail, driver.used
    queue = RemoteQueue(batches(channel, kicked=kicked), 3, 16, *addresses, F_EVENT_IDX)
    queue.patience = 1
    driver.offer(driver.chain([Piece(0x5000, 8)]), driver.chain([Piece(0x6000, 8)]))
    first, last = queue.take()

    queue.publish([(first.head, 0)])
    assert (channel.returned, kicked) == ([0], {3})
    queue.publish([(last.head, 0)])

    assert (channel.returned, kicked) == ([0, protocol.RESTED], set())


def test_guest_without_a_processor_of_its_own_is_not_waited_for() -> None:
    """What it has by then is seen all the same, and a notify asked for."""
    assert looks_with(1) == 1
    assert 1 < looks_with(2) <= protocol.MOST_LOOKS


def test_guess_is_of_no_use_for_a_ring_that_came_after_it(channel: Answering) -> None:
    """As where a notify is asked for, which brings the ring as it is by then."""
    memory = batches(channel)
    driver = VirtioQueueDriver(channel.memory, 0x8000, 16)
    addresses = driver.desc, driver.avail, driver.used
    queue = RemoteQueue(memory, 0, 16, *addresses, F_EVENT_IDX)
    driver.offer(driver.chain([Piece(0x5000, 8)]))
    memory.read_many(HEADERS)
    assert len(queue.take()) == 1  # a look with a guess, and another one

    channel.memory.poke(b"news", 0x2000)

    assert memory.read_many(HEADERS)[:4] == b"news"
