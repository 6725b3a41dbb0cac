"""A device's process that lies: it costs the guest that device, and pyvmm nothing."""

from __future__ import annotations

import errno
import json
import select
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_bindings import fdops
from tests.support.device_process import READY, ByHand, DiskRig
from tests.support.virtio_machine import RINGS, VirtioMachine
from vmm.core.ranges import Range
from vmm.core.saved import BadState, NotSaved, Saved
from vmm.devices.process import protocol
from vmm.devices.process.protocol import COUNTS, HEAD, RETURNED, WRITE_HEAD, words
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk

NEEDS_RESET = 0x40
IOERR = 1
NOTHING = bytes(COUNTS.size)


def _turn(flags: int = 0, queue: int = 0, body: bytes = NOTHING) -> Callable[[DiskRig], None]:
    return lambda rig: rig.say(protocol.TURN, flags, queue, body)


def _move(what: int, moves: tuple[int, ...], file: int = 0) -> Callable[[DiskRig], None]:
    return lambda rig: rig.say(what, 0, file, words(moves))


LIES: dict[str, Callable[[DiskRig], None]] = {
    "a packet that is too short": lambda rig: rig.raw(b"?"),
    "a packet that is too long": lambda rig: rig.raw(bytes(protocol.LONGEST + 1)),
    "a message that doesn't exist": lambda rig: rig.say(99),
    "what pyvmm says": lambda rig: rig.say(protocol.KICK),
    "garbage to read": lambda rig: rig.say(protocol.READ, 0, 0, b"\xff" * 15),
    "nothing to read": lambda rig: rig.say(protocol.READ),
    "a truncated write": lambda rig: rig.say(protocol.WRITE, 0, 0, WRITE_HEAD.pack(0, 9, 0)),
    "a file that doesn't exist": _move(protocol.MOVE_IN, (0, 0x1000, 512), file=1),
    "a move behind the disk's end": _move(protocol.MOVE_IN, (512 * 512 - 1, 0x1000, 2)),
    "a write behind the disk's end": _move(protocol.MOVE_OUT, (0x1000, 512 * 512 - 1, 2)),
    "a turn that rests without a kick": _turn(protocol.RESTED),
    "an interrupt of a queue that isn't there": _turn(protocol.INTERRUPT, queue=1),
    "a turn without its counts": _turn(protocol.INTERRUPT, body=b""),
    "a count that is none": _turn(body=COUNTS.pack(1 << 63, 0, 0, 0, 0)),
    "done with nothing": lambda rig: rig.say(protocol.DONE),
    "a number to keep that is none": lambda rig: rig.say(protocol.KEEP, body=b"?"),
    "another configuration's size": lambda rig: rig.say(protocol.CONFIG, body=b"?"),
}


@pytest.mark.parametrize("lie", LIES)
def test_process_that_breaks_the_protocol_is_ended_and_requests_fail(
    by_hand: DiskRig, lie: str
) -> None:
    data, status = by_hand.read(7)
    assert by_hand.machine.interrupts == 0

    LIES[lie](by_hand)

    counts = by_hand.device.statistics.as_dict()
    assert counts["process"]["deaths"] == 1
    assert "broke the protocol" in counts["process"]["last_end"]
    assert by_hand.status(status) == IOERR
    assert by_hand.machine.text(data, 4) == b"\xcc" * 4
    assert by_hand.machine.interrupts == 1
    assert counts["errors"] == 1


def test_process_that_rests_twice_for_one_kick_is_ended(by_hand: DiskRig) -> None:
    by_hand.read(7)
    by_hand.serve()
    assert by_hand.hear()[0] == protocol.KICK

    by_hand.say(protocol.TURN, protocol.RESTED, 0, NOTHING)
    assert by_hand.device.statistics.deaths == 0
    by_hand.say(protocol.TURN, protocol.RESTED, 0, NOTHING)

    assert by_hand.device.statistics.deaths == 1


def test_read_only_disk_is_not_written_by_its_process(tmp_path: Path) -> None:
    rig = DiskRig(tmp_path, ByHand(), ",ro")
    rig.up_by_hand()
    before = rig.disk()

    rig.say(protocol.MOVE_OUT, 0, 0, words((0x1000, 0, 512)))

    assert rig.device.statistics.deaths == 1
    assert rig.disk() == before
    rig.close()


def test_private_page_is_refused_and_stops_the_device_as_refused(by_hand: DiskRig) -> None:
    by_hand.memory.private.append(Range(0x9000, 0x1000))

    read = by_hand.ask(protocol.READ, words((0x8000, 8, 0x9FF8, 8)))
    moved = by_hand.ask(protocol.MOVE_IN, words((0, 0x9000, 512)))
    written = by_hand.ask(protocol.WRITE, WRITE_HEAD.pack(0, 1, 0) + words((0x9000, 1)) + b"x")

    assert [status for status, _ in (read, moved, written)] == [protocol.PRIVATE] * 3
    assert by_hand.device.statistics.bytes_read == 0
    by_hand.say(protocol.STOPPED, protocol.REFUSED, 0, b"whatever it says")
    assert by_hand.machine.driver.status & NEEDS_RESET
    assert by_hand.device.statistics.refused == 1
    assert "private" in str(by_hand.machine.transport.failure)


def test_address_outside_memory_is_refused(by_hand: DiskRig) -> None:
    status, _ = by_hand.ask(protocol.READ, words(((1 << 64) - 8, 8)))

    assert status == protocol.UNMAPPED


def test_write_after_a_move_that_is_refused_is_not_made(by_hand: DiskRig) -> None:
    by_hand.memory.private.append(Range(0x9000, 0x1000))
    by_hand.memory.poke(b"before", 0x8000)
    body = WRITE_HEAD.pack(1, 1, 0) + words((0, 0x9000, 512, 0x8000, 5)) + b"after"

    status, _ = by_hand.ask(protocol.WRITE, body)

    assert status == protocol.PRIVATE
    assert by_hand.memory.peek(6, 0x8000) == b"before"


def test_write_after_a_short_move_is_not_made(by_hand: DiskRig) -> None:
    by_hand.path.write_bytes(bytes(600))  # somebody has cut the disk
    by_hand.memory.poke(b"before", 0x8000)
    body = WRITE_HEAD.pack(1, 1, 0) + words((512, 0x9000, 512, 0x8000, 5)) + b"after"

    status, _ = by_hand.ask(protocol.WRITE, body)

    assert status == protocol.SHORT
    assert by_hand.memory.peek(6, 0x8000) == b"before"


def test_error_of_the_host_reaches_the_process_by_its_number(
    by_hand: DiskRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(by_hand.memory, "move_out", full)

    status, body = by_hand.ask(protocol.MOVE_OUT, words((0x1000, 0, 512)))

    assert (status, protocol.ERRNO.unpack(body)) == (protocol.FAILED, (errno.ENOSPC,))


def test_access_of_before_a_reset_is_stale_and_moves_nothing(by_hand: DiskRig) -> None:
    former = by_hand.generation
    by_hand.machine.driver.status = 0
    by_hand.machine.up()

    by_hand.raw(HEAD.pack(protocol.MOVE_IN, 0, 0, former) + words((0, 0x9000, 512)))

    said: list[tuple[int, int, int, bytes]] = []
    while not said or said[-1][0] != protocol.ANSWER:
        said.append(by_hand.hear())
    assert said[-1][1] == protocol.STALE
    assert by_hand.memory.peek(4, 0x9000) == bytes(4)
    assert by_hand.device.statistics.bytes_read == 0


def test_interrupt_of_before_a_reset_is_dropped(by_hand: DiskRig) -> None:
    former = by_hand.generation
    by_hand.machine.driver.status = 0
    by_hand.machine.up()

    by_hand.raw(HEAD.pack(protocol.TURN, protocol.INTERRUPT, 0, former) + NOTHING)

    assert by_hand.machine.interrupts == 0
    assert by_hand.device.statistics.deaths == 0


def test_guest_that_resets_without_end_fills_no_socket(by_hand: DiskRig) -> None:
    for _ in range(300):
        by_hand.machine.driver.status = 0
        by_hand.machine.up()

    assert by_hand.hear()[0] in (protocol.RESET, protocol.ACTIVATE)
    by_hand.far.setblocking(False)
    with pytest.raises(BlockingIOError):
        by_hand.far.recv(protocol.LONGEST)
    by_hand.far.settimeout(10)
    by_hand.say(protocol.DONE)
    assert by_hand.hear()[0] == protocol.ACTIVATE  # the last one's
    assert by_hand.device.statistics.deaths == 0


def test_process_that_takes_no_answers_is_ended(by_hand: DiskRig) -> None:
    for _ in range(2000):
        if by_hand.device.statistics.deaths:
            break
        by_hand.say(protocol.READ, 0, 0, words((0x1000, protocol.MOST_DATA)))

    assert by_hand.device.statistics.deaths == 1


def test_one_message_is_carried_out_at_a_time(by_hand: DiskRig) -> None:
    """So that a process that floods its socket has one turn among all on the loop."""
    for _ in range(5):
        by_hand.far.send(HEAD.pack(protocol.READ, 0, 0, by_hand.generation) + words((0x1000, 8)))

    by_hand.machine.loop.run_ready()

    assert by_hand.hear()[0] == protocol.ANSWER
    by_hand.far.setblocking(False)
    with pytest.raises(BlockingIOError):
        by_hand.far.recv(protocol.LONGEST)


def _timer(rig: DiskRig) -> None:
    rig.timers.pop()[1]()
    rig.machine.settle()


def test_process_that_is_silent_is_ended_and_requests_fail(by_hand: DiskRig) -> None:
    _, status = by_hand.read(7)
    by_hand.serve()
    by_hand.device._heard = False  # as after the first timer

    _timer(by_hand)

    assert by_hand.device.statistics.deaths == 1
    assert by_hand.device.statistics.last_end == "said nothing for 30 s"
    assert by_hand.status(status) == IOERR


def test_process_with_nothing_to_do_may_be_silent(by_hand: DiskRig) -> None:
    by_hand.device._heard = False

    _timer(by_hand)

    assert by_hand.device.statistics.deaths == 0
    assert not by_hand.timers


def test_process_that_has_spoken_while_nobody_listened_is_not_silent(by_hand: DiskRig) -> None:
    """As while the machine is paused."""
    by_hand.read(7)
    by_hand.serve()
    by_hand.device._heard = False
    by_hand.far.send(HEAD.pack(protocol.READ, 0, 0, by_hand.generation) + words((0x1000, 8)))

    by_hand.timers.pop()[1]()

    assert by_hand.device.statistics.deaths == 0
    assert by_hand.timers


def test_text_of_a_process_is_one_short_line(by_hand: DiskRig) -> None:
    by_hand.say(protocol.STOPPED, 0, 0, b"\x1b[2J\n" + b"x" * 5000)

    failure = str(by_hand.machine.transport.failure)
    assert by_hand.machine.driver.status & NEEDS_RESET
    assert failure.isprintable()
    assert len(failure) < 400


def test_sentences_of_a_process_are_few_short_lines_that_say_whose_they_are(
    by_hand: DiskRig, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(protocol.MOST_NOTES + 3):
        by_hand.say(protocol.NOTE, 0, 0, b"\x1b[2J\n" + b"x" * 5000)

    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == protocol.MOST_NOTES
    assert all(line.startswith("pyvmm: blk0: its process says: ") for line in lines)
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    assert by_hand.device.statistics.deaths == 0


def test_device_in_a_process_is_not_saved(by_hand: DiskRig) -> None:
    with pytest.raises(NotSaved, match="without the setting process"):
        by_hand.machine.transport.state()


def test_device_in_a_process_is_not_restored(by_hand: DiskRig) -> None:
    by_hand.machine.driver.status = 0
    own = VirtioMachine(VirtioBlock(open_disk(f"{by_hand.path},share=on"), fdops.punch_hole))
    saved = Saved(json.loads(json.dumps(own.transport.state())), "blk0")
    own.close()

    with pytest.raises(BadState, match="leave the setting process away"):
        by_hand.machine.transport.restore(saved)


def test_request_without_room_for_a_status_stops_a_disk_without_a_process(
    by_hand: DiskRig,
) -> None:
    by_hand.machine.give(0, by_hand.machine.place(struct.pack("<IIQ", 0, 0, 0)))

    by_hand.say(99)

    assert by_hand.machine.driver.status & NEEDS_RESET


def test_device_that_fails_no_requests_needs_a_reset_when_its_process_ends(
    tmp_path: Path,
) -> None:
    rig = DiskRig(tmp_path, ByHand(), fails_requests=False)
    rig.up_by_hand()

    rig.far.close()
    rig.machine.settle()

    assert rig.machine.driver.status & NEEDS_RESET
    rig.machine.driver.status = 0
    rig.machine.up()  # without a process it needs one again at once
    assert rig.machine.driver.status & NEEDS_RESET
    rig.device.restart()
    rig.raw(READY)
    rig.machine.driver.status = 0
    rig.machine.up()
    assert not rig.machine.driver.status & NEEDS_RESET
    rig.close()


def test_mistake_of_pyvmm_s_own_costs_the_device_and_not_the_run(
    by_hand: DiskRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise AssertionError("a mistake")

    monkeypatch.setattr(by_hand.memory, "move_in", broken)

    by_hand.say(protocol.MOVE_IN, 0, 0, words((0, 0x1000, 512)))

    assert "a mistake" in str(by_hand.device.statistics.last_end)


edges = st.sampled_from([0, 1, 8, 512, 0x9000, RINGS, protocol.MOST_DATA, 1 << 20, (1 << 64) - 1])
lists = st.lists(st.one_of(edges, st.integers(0, (1 << 64) - 1)), max_size=9).map(words)
writes = st.tuples(
    st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), lists, st.binary(max_size=64)
).map(lambda parts: WRITE_HEAD.pack(*parts[:3]) + parts[3] + parts[4])
returns = st.tuples(
    st.tuples(*[st.integers(0, 2)] * 4),
    st.integers(0, 17),
    st.integers(0, 255),
    st.sampled_from([NOTHING, b"\xff" * COUNTS.size]),
    writes,
).map(lambda parts: RETURNED.pack(*parts[0], *parts[1:4]) + parts[4])
packets = st.tuples(
    st.integers(0, 26),
    st.integers(0, 3),
    st.integers(0, 2),
    st.booleans(),
    st.one_of(lists, writes, returns, st.binary(max_size=64), st.just(NOTHING)),
)


@settings(
    max_examples=80, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.lists(packets, min_size=1, max_size=12))
def test_any_packets_cost_the_guest_its_device_at_most(
    tmp_path: Path, said: list[tuple[int, int, int, bool, bytes]]
) -> None:
    """No exception leaves, private memory stays as it is, the disk is as long as it was."""
    rig = DiskRig(tmp_path, ByHand())
    rig.up_by_hand()
    rig.memory.private.append(Range(0x9000, 0x1000))
    rig.memory.poke(b"secret", 0x9000)
    try:
        for what, flags, queue, is_stale, body in said:
            if rig.device.statistics.deaths:
                break
            generation = rig.generation - is_stale & 0xFFFF_FFFF
            rig.raw(HEAD.pack(what, flags, queue, generation) + body)
        assert rig.memory.peek(6, 0x9000) == b"secret"
        assert rig.path.stat().st_size == 512 * 512
        assert "had pyvmm fail" not in str(rig.device.statistics.last_end)
    finally:
        rig.close()


def test_counts_on_their_way_when_the_loop_ends_are_heard_out(by_hand: DiskRig) -> None:
    by_hand.read(7)
    by_hand.serve()
    by_hand.hear()
    head = HEAD.pack(protocol.TURN, protocol.RESTED, 0, by_hand.generation)
    by_hand.far.send(head + protocol.COUNTS.pack(5, 1, 2, 9, 9))

    by_hand.device.hear_out(10)

    counts = by_hand.device.statistics
    assert (counts.requests, counts.flushes, counts.errors) == (5, 1, 2)
    assert (counts.bytes_read, counts.bytes_written) == (0, 0)  # a disk's are counted here


def test_counts_of_a_turn_under_way_at_the_guests_last_reset_are_heard_out(
    by_hand: DiskRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that looks at the used ring by itself may reset before the turn's end is told."""
    by_hand.read(7)
    by_hand.serve()
    by_hand.hear()
    former = by_hand.generation
    by_hand.machine.driver.status = 0
    wait = select.select

    def and_then(*what: Any) -> Any:
        """While it is waited for, the process says what it still has to."""
        monkeypatch.undo()
        if what[-1]:
            head = HEAD.pack(protocol.TURN, protocol.RESTED, 0, former)
            by_hand.far.send(head + protocol.COUNTS.pack(5, 0, 0, 0, 0))
            by_hand.say(protocol.DONE)
        return wait(*what)

    monkeypatch.setattr(select, "select", and_then)

    by_hand.device.hear_out(10)

    assert by_hand.device.statistics.requests == 5


def test_process_that_says_nothing_is_not_heard_out_for_longer_than_said(
    by_hand: DiskRig,
) -> None:
    by_hand.read(7)
    by_hand.serve()

    by_hand.device.hear_out(0)

    assert by_hand.device.statistics.deaths == 0


def test_counts_of_a_turn_from_before_a_reset_count(by_hand: DiskRig) -> None:
    former = by_hand.generation
    by_hand.machine.driver.status = 0

    by_hand.raw(HEAD.pack(protocol.TURN, 0, 0, former) + protocol.COUNTS.pack(3, 0, 0, 0, 0))

    assert by_hand.device.statistics.requests == 3
