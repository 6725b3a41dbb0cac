"""RETURN, by which a process tells the driver of chains: the write, its interrupt and what is in
the ring next come by one message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.device_process import DiskRig
from vmm.core.ranges import Range
from vmm.devices.process import protocol
from vmm.devices.process.protocol import RETURNED, WRITE_HEAD, words
from vmm.devices.virtio.queue import F_EVENT_IDX

PRIVATE_PAGE = 0x90000


def element(rig: DiskRig, chains: int = 1) -> tuple[list[int], bytes]:
    """The pieces, and their data, that return the first of the chains."""
    queue = rig.machine.queues[0]
    pieces = [queue.used + 4, 8 * chains, queue.used + 2, 2]
    return pieces, bytes(8 * chains) + chains.to_bytes(2, "little")


def returned(
    rig: DiskRig,
    *,
    chains: int = 1,
    known: int = 1,
    looks: int = 0,
    moves: tuple[int, ...] = (),
    then: tuple[int, ...] = (),
    queue: int = 0,
    number: int = 0,
    counts: bytes = bytes(40),
) -> bytes:
    """A RETURN of the first chains of the ring."""
    pieces, data = element(rig, chains)
    head = WRITE_HEAD.pack(len(moves) // 3, len(pieces) // 2, len(then) // 2)
    numbers = words([*moves, *pieces, *then])
    return (
        RETURNED.pack(queue, chains, chains, known, looks, number, counts) + head + numbers + data
    )


def ring(rig: DiskRig) -> tuple[int, ...]:
    queue = rig.machine.queues[0]
    return tuple(protocol.ring_pieces(queue.size, queue.desc, queue.avail))


def up_without_event_indexes(rig: DiskRig) -> None:
    rig.machine.driver.status = 0
    rig.machine.up(refuse=F_EVENT_IDX)
    while rig.hear()[0] != protocol.ACTIVATE:
        rig.say(protocol.DONE)
    rig.say(protocol.DONE)


def before_each(rig: DiskRig, done: Callable[[str, int], None]) -> None:
    rig.memory.before = done


def test_driver_that_wants_an_interrupt_has_it_with_the_used_ring(by_hand: DiskRig) -> None:
    by_hand.read(7)
    order: list[str] = []
    before_each(by_hand, lambda verb, gpa: order.append(verb))
    by_hand.machine.transport._interrupt = lambda: order.append("interrupt")

    status, head = by_hand.ask(protocol.RETURN, returned(by_hand))

    assert status == protocol.OK
    assert order.index("write_many") < order.index("pread") < order.index("interrupt")
    assert order.count("interrupt") == 1
    assert by_hand.machine.queues[0].collect() == [(0, 0)]
    assert head == bytes(2) + b"\1\0"  # flags and index


def test_driver_that_wants_no_interrupt_yet_has_none(by_hand: DiskRig) -> None:
    """Event index: for the third chain."""
    queue = by_hand.machine.queues[0]
    by_hand.memory.poke(b"\2\0", queue.avail + 4 + 2 * queue.size)

    by_hand.ask(protocol.RETURN, returned(by_hand, chains=2))
    assert by_hand.machine.interrupts == 0
    by_hand.ask(protocol.RETURN, returned(by_hand, chains=3))
    assert by_hand.machine.interrupts == 1


@pytest.mark.parametrize(("flags", "interrupts"), [(0, 1), (1, 0)])
def test_driver_without_event_indexes_says_so_by_its_flag(
    by_hand: DiskRig, flags: int, interrupts: int
) -> None:
    up_without_event_indexes(by_hand)
    by_hand.machine.queues[0].set_available_index(1, flags)

    by_hand.ask(protocol.RETURN, returned(by_hand))

    assert by_hand.machine.interrupts == interrupts


def test_what_is_in_the_ring_by_then_comes_with_the_answer(by_hand: DiskRig) -> None:
    by_hand.read(7)
    by_hand.read(8)
    then = ring(by_hand)

    status, answer = by_hand.ask(protocol.RETURN, returned(by_hand, known=1, then=then))

    assert status == protocol.OK
    assert answer[2:4] == b"\2\0"
    assert len(answer) == sum(then[1::2])


def _polls(rig: DiskRig) -> None:
    """The driver wants no interrupts, as one that polls."""
    queue = rig.machine.queues[0]
    rig.memory.poke(b"\0\x80", queue.avail + 4 + 2 * queue.size)


def test_ring_is_looked_at_until_there_is_something_new(by_hand: DiskRig) -> None:
    by_hand.read(7)
    _polls(by_hand)
    avail = by_hand.machine.queues[0].avail
    looks = 0

    def offer_at_the_third(verb: str, gpa: int) -> None:
        nonlocal looks
        if verb == "pread" and gpa == avail:
            looks += 1
            if looks == 1 + 3:  # the first is for the interrupt
                by_hand.machine.queues[0].set_available_index(2)

    before_each(by_hand, offer_at_the_third)

    then = ring(by_hand)
    _, answer = by_hand.ask(protocol.RETURN, returned(by_hand, known=1, looks=9, then=then))

    assert looks == 1 + 3
    assert answer[2:4] == b"\2\0"
    assert len(answer) == sum(then[1::2])
    assert by_hand.machine.interrupts == 0


def test_ring_with_nothing_new_is_looked_at_as_often_as_said_and_a_notify_asked_for(
    by_hand: DiskRig,
) -> None:
    by_hand.read(7)
    _polls(by_hand)
    order: list[str] = []
    before_each(by_hand, lambda verb, gpa: order.append(verb))

    _, answer = by_hand.ask(
        protocol.RETURN, returned(by_hand, known=1, looks=5, then=ring(by_hand))
    )

    # The last look comes after the driver could see that a notify is asked for (2.7.10).
    assert order[-9:] == ["write_many", *["pread"] * (1 + 5), "pwrite", "pread"]
    assert by_hand.machine.queues[0].notify_event() == 1
    assert answer == bytes(2) + b"\1\0" + b"\1\0"


def test_request_that_comes_while_a_notify_is_asked_for_is_seen(by_hand: DiskRig) -> None:
    by_hand.read(7)
    _polls(by_hand)
    asked = by_hand.machine.queues[0].used + 4 + 8 * 16

    def offer(verb: str, gpa: int) -> None:
        if (verb, gpa) == ("pwrite", asked):
            by_hand.machine.queues[0].set_available_index(2)

    before_each(by_hand, offer)
    then = ring(by_hand)

    _, answer = by_hand.ask(protocol.RETURN, returned(by_hand, known=1, looks=5, then=then))

    assert answer[2:4] == b"\2\0"
    assert len(answer) == sum(then[1::2])


def test_driver_without_event_indexes_is_asked_for_no_notify(by_hand: DiskRig) -> None:
    """Where that would be written means nothing to it."""
    up_without_event_indexes(by_hand)
    by_hand.machine.queues[0].set_available_index(1, 1)
    by_hand.memory.calls.clear()

    _, answer = by_hand.ask(protocol.RETURN, returned(by_hand, known=1, looks=5))

    assert answer == b"\1\0\1\0"
    assert by_hand.memory.calls["pwrite"] == 0


def test_no_looks_ask_for_no_notify(by_hand: DiskRig) -> None:
    """As for devices that see to that themselves."""
    by_hand.read(7)
    by_hand.memory.calls.clear()

    _, answer = by_hand.ask(protocol.RETURN, returned(by_hand, known=1))

    assert answer == bytes(2) + b"\1\0"
    assert by_hand.memory.calls["pwrite"] == 0


def test_interrupted_driver_is_not_waited_for(by_hand: DiskRig) -> None:
    by_hand.read(7)
    by_hand.memory.calls.clear()

    by_hand.ask(protocol.RETURN, returned(by_hand, known=1, looks=9, then=ring(by_hand)))

    assert by_hand.machine.interrupts == 1
    assert by_hand.memory.calls["pread"] == 2  # for the event, and after a notify was asked for


def _kick_after(rig: DiskRig, number: int, *more: int) -> tuple[int, bytes]:
    """The flags and body of the KICK that follows a RETURN with this number."""
    _polls(rig)
    body = returned(rig, known=0, looks=1, then=(*ring(rig), *more), number=number)
    rig.ask(protocol.RETURN, body)
    rig.read(7)
    rig.serve()
    what, flags, _, brought = rig.hear()
    assert what == protocol.KICK
    return flags, brought


def test_kick_brings_what_the_last_return_had_read(by_hand: DiskRig) -> None:
    by_hand.memory.poke(b"header", 0x80000)

    flags, brought = _kick_after(by_hand, 9, 0x80000, 6)

    assert flags == 9
    assert brought[2:4] == b"\1\0"
    assert brought.endswith(b"header")


def test_kick_brings_the_ring_alone_where_the_rest_has_become_private(by_hand: DiskRig) -> None:
    by_hand.memory.private.append(Range(PRIVATE_PAGE, 0x1000))

    flags, brought = _kick_after(by_hand, 9, PRIVATE_PAGE, 6)

    assert flags == 0
    assert len(brought) == sum(ring(by_hand)[1::2])


def test_kick_brings_no_more_than_fits_into_the_socket(by_hand: DiskRig) -> None:
    flags, brought = _kick_after(by_hand, 9, 0x80000, protocol.MOST_WITH_KICK)

    assert flags == 0
    assert len(brought) == sum(ring(by_hand)[1::2])


def test_kick_after_a_reset_brings_nothing_of_before(by_hand: DiskRig) -> None:
    _polls(by_hand)
    body = returned(by_hand, known=0, looks=1, then=(*ring(by_hand), 0x80000, 6), number=9)
    by_hand.ask(protocol.RETURN, body)

    by_hand.machine.driver.status = 0
    by_hand.machine.up()
    while by_hand.hear()[0] != protocol.ACTIVATE:
        by_hand.say(protocol.DONE)
    by_hand.say(protocol.DONE)
    by_hand.read(7)
    by_hand.serve()

    what, flags, _, brought = by_hand.hear()
    assert (what, flags) == (protocol.KICK, 0)
    assert len(brought) == sum(ring(by_hand)[1::2])


COUNTED = protocol.COUNTS.pack(7, 6, 5, 4, 3)


def test_counts_that_come_along_are_the_device_s(by_hand: DiskRig) -> None:
    by_hand.read(7)

    by_hand.ask(protocol.RETURN, returned(by_hand, counts=COUNTED))

    counts = by_hand.device.statistics
    assert (counts.requests, counts.flushes, counts.errors) == (7, 6, 5)
    assert (counts.bytes_read, counts.bytes_written) == (0, 0)  # of a disk pyvmm counts them


def test_what_was_not_returned_does_not_count(by_hand: DiskRig) -> None:
    by_hand.memory.private.append(Range(PRIVATE_PAGE, 0x1000))

    by_hand.ask(protocol.RETURN, returned(by_hand, moves=(0, PRIVATE_PAGE, 512), counts=COUNTED))

    assert by_hand.device.statistics.requests == 0


def _kicked(rig: DiskRig) -> None:
    """A request that the process knows of, by a driver that polls."""
    rig.read(7)
    _polls(rig)
    rig.serve()
    assert rig.hear()[0] == protocol.KICK


def test_process_rests_once_a_notify_was_asked_for(by_hand: DiskRig) -> None:
    """The next notify is a KICK at once."""
    _kicked(by_hand)

    by_hand.ask(protocol.RETURN, returned(by_hand, looks=1), protocol.RESTED)
    by_hand.read(8)
    by_hand.serve()

    assert by_hand.hear()[0] == protocol.KICK


def test_process_does_not_rest_while_there_is_something_new(by_hand: DiskRig) -> None:
    """Else what it is silent about would be nothing that it has to do."""
    _kicked(by_hand)
    by_hand.read(8)

    by_hand.ask(protocol.RETURN, returned(by_hand, looks=1), protocol.RESTED)

    assert by_hand.device._kicked == {0}


def test_process_does_not_rest_where_no_notify_can_be_asked_for(by_hand: DiskRig) -> None:
    up_without_event_indexes(by_hand)
    by_hand.read(7)
    by_hand.serve()
    assert by_hand.hear()[0] == protocol.KICK

    by_hand.ask(protocol.RETURN, returned(by_hand, looks=1), protocol.RESTED)

    assert by_hand.device._kicked == {0}


def test_notify_from_before_the_process_rests_is_a_kick_then(by_hand: DiskRig) -> None:
    _kicked(by_hand)
    by_hand.serve()  # the driver notifies for nothing

    by_hand.say(protocol.RETURN, protocol.RESTED, 0, returned(by_hand, looks=1))

    assert [by_hand.hear()[0] for _ in range(2)] == [protocol.KICK, protocol.ANSWER]
    assert by_hand.device._kicked == {0}


def test_process_that_rests_without_a_kick_is_ended_and_writes_nothing(by_hand: DiskRig) -> None:
    by_hand.say(protocol.RETURN, protocol.RESTED, 0, returned(by_hand, looks=1))

    assert by_hand.device.statistics.deaths == 1
    assert "was not kicked" in str(by_hand.device.statistics.last_end)
    assert by_hand.machine.queues[0].used_index() == 0


def test_move_that_is_refused_returns_nothing_and_interrupts_nobody(by_hand: DiskRig) -> None:
    by_hand.memory.private.append(Range(PRIVATE_PAGE, 0x1000))

    status, _ = by_hand.ask(protocol.RETURN, returned(by_hand, moves=(0, PRIVATE_PAGE, 512)))

    assert status == protocol.PRIVATE
    assert by_hand.machine.queues[0].used_index() == 0
    assert by_hand.machine.interrupts == 0


def test_short_move_returns_nothing_and_interrupts_nobody(by_hand: DiskRig) -> None:
    by_hand.path.write_bytes(bytes(600))  # somebody has cut the disk

    status, _ = by_hand.ask(protocol.RETURN, returned(by_hand, moves=(512, 0x80000, 512)))

    assert status == protocol.SHORT
    assert by_hand.machine.queues[0].used_index() == 0
    assert by_hand.machine.interrupts == 0


@pytest.mark.parametrize(("reads", "brought"), [(1, 0), (2, 4), (3, 4)])
def test_write_that_was_made_is_no_error_whatever_is_refused_afterwards(
    by_hand: DiskRig, reads: int, brought: int
) -> None:
    """Else the process would do again what the driver has been told of."""
    by_hand.read(7)
    _polls(by_hand)
    by_hand.memory.calls.clear()

    def convert(verb: str, gpa: int) -> None:
        if by_hand.memory.calls["pread"] == reads:
            by_hand.memory.private.append(Range(by_hand.machine.queues[0].avail, 4))

    before_each(by_hand, convert)

    status, answer = by_hand.ask(
        protocol.RETURN, returned(by_hand, known=1, looks=3, then=ring(by_hand))
    )

    assert status == protocol.OK
    assert len(answer) == brought
    assert by_hand.machine.queues[0].used_index() == 1


def test_guess_that_is_private_comes_to_no_more_than_the_index(by_hand: DiskRig) -> None:
    by_hand.read(7)
    by_hand.memory.private.append(Range(PRIVATE_PAGE, 0x1000))
    by_hand.memory.poke(b"secret", PRIVATE_PAGE)

    status, answer = by_hand.ask(
        protocol.RETURN, returned(by_hand, known=0, then=(*ring(by_hand), PRIVATE_PAGE, 6))
    )

    assert (status, len(answer)) == (protocol.OK, 4)


def test_chains_of_before_a_reset_are_stale_and_interrupt_nobody(by_hand: DiskRig) -> None:
    body = returned(by_hand)
    former = by_hand.generation
    by_hand.machine.driver.status = 0
    by_hand.machine.up()

    by_hand.raw(protocol.HEAD.pack(protocol.RETURN, 0, 0, former) + body)

    said: list[Any] = []
    while not said or said[-1][0] != protocol.ANSWER:
        said.append(by_hand.hear())
    assert said[-1][1] == protocol.STALE
    assert by_hand.machine.queues[0].used_index() == 0
    assert by_hand.machine.interrupts == 0


LIES: dict[str, Callable[[DiskRig], bytes]] = {
    "nothing at all": lambda rig: b"",
    "half of what it begins with": lambda rig: bytes(RETURNED.size - 1),
    "no write": lambda rig: RETURNED.pack(0, 1, 1, 1, 0, 0, bytes(40)),
    "a queue that isn't there": lambda rig: returned(rig, queue=1),
    "more looks than there may be": lambda rig: returned(rig, looks=protocol.MOST_LOOKS + 1),
    "a write of other bytes than it brings": lambda rig: returned(rig) + b"?",
    "a move behind the disk's end": lambda rig: returned(rig, moves=(512 * 512, 0x80000, 512)),
    "a count that is none": lambda rig: returned(
        rig, counts=protocol.COUNTS.pack(0, 0, 0, 1 << 63, 0)
    ),
    "more to read than there may be": lambda rig: returned(
        rig, then=(0x1000, 8) * (protocol.MOST_AFTER + 1)
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_return_beyond_the_rules_ends_the_process_and_writes_nothing(
    by_hand: DiskRig, lie: str
) -> None:
    by_hand.say(protocol.RETURN, 0, 0, LIES[lie](by_hand))

    assert by_hand.device.statistics.deaths == 1
    assert "broke the protocol" in str(by_hand.device.statistics.last_end)
    assert by_hand.machine.queues[0].used_index() == 0
    assert by_hand.machine.interrupts == 0
