"""A network card in a process of its own, on a network that the test holds the other end of."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.support.fake_memory import BatchingFakeMemory, FakeMemory
from tests.support.virtio_driver import Piece
from tests.support.virtio_machine import MEMORY, VirtioMachine
from vmm.devices.process import protocol
from vmm.devices.process.front_end import ProcessDevice
from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio.net import HEADER_SIZE, RX, TX, VirtioNet
from vmm.devices.virtio.pci_function import DEVICE_CFG
from vmm.devices.virtio.queue import F_INDIRECT_DESC

MAC = bytes.fromhex("020000000001")
HEADER = bytes(HEADER_SIZE)
PLAIN = HEADER[:10] + b"\1\0"  # num_buffers: 1
STATUS_AT = 6  # of the configuration
NEEDS_RESET = 0x40


class Wire:
    """A network that takes and gives a frame at a time, as a tap does."""

    features = 0
    is_stream = False

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self.fd = end.fileno()

    def set_offloads(self, features: int) -> None:
        pass

    def receive(self) -> bytes | None:
        try:
            return self._end.recv(1 << 16)
        except BlockingIOError:
            return None

    def send(self, frame: bytes) -> bool:
        self._end.send(frame)
        return True

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        self._end.close()


class NetRig:
    def __init__(self, *, restarts: bool = True, batching: bool = True) -> None:
        ours, self.wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wire.settimeout(10)
        net = VirtioNet(Wire(ours), MAC)
        net.wants_process = True
        self.spawner = Spawner(None)
        number = self.spawner.add(Job(net, [], [ours.fileno()]))
        self.spawner.begin()
        self.device = ProcessDevice(
            net, "net0", number, self.spawner, config_without=net.config_with(link_up=False),
            restarts=restarts,
        )  # fmt: skip
        self.said: list[int] = []
        self._obey, self.device._obey = self.device._obey, self._note  # type: ignore[method-assign]
        self.machine = VirtioMachine(
            self.device, (BatchingFakeMemory if batching else FakeMemory)(MEMORY)
        )
        self.machine.up()

    def _note(self, size: int) -> int | None:
        self.said.append(self.device._buffer[0])
        return self._obey(size)

    def close(self) -> None:
        self.machine.close()
        self.spawner.close()
        self.wire.close()

    @property
    def link_is_up(self) -> bool:
        return bool(self.machine.transport.read(DEVICE_CFG + STATUS_AT, 2) & 1)

    def send(self, frame: bytes) -> bytes:
        """Have the driver send a frame; what arrives."""
        self.machine.give(TX, self.machine.place(HEADER + frame))
        self.machine.kick(TX)
        return self.sent()

    def sent(self) -> bytes:
        """The next frame that leaves."""
        while True:
            fds: list[socket.socket | int] = [self.wire, *self.machine.loop.wanted]
            ready, _, _ = select.select(fds, [], [], 10)
            assert ready, "nothing leaves"
            self.machine.settle()
            if self.wire in ready:
                return self.wire.recv(1 << 16)

    def receive(self, frame: bytes) -> bytes:
        """What the driver gets of a frame that arrives."""
        room = self.machine.blank(HEADER_SIZE + len(frame))
        self.machine.give(RX, room)
        self.machine.kick(RX)
        self.wire.send(HEADER + frame)
        while self.machine.text(room, 1) == b"\xcc":
            self.until_said()
        return self.machine.text(room, HEADER_SIZE + len(frame))

    def until_said(self) -> None:
        """Wait for a word of the process, and what it brings about."""
        assert self.machine.loop.wait(10), "the process says nothing"
        self.machine.settle()

    def kill(self) -> None:
        os.kill(self.device.statistics.pid, signal.SIGKILL)
        while not self.device.statistics.deaths:
            self.until_said()


@pytest.fixture(params=[True, False], ids=["batches", "single"])
def rig(request: pytest.FixtureRequest) -> Iterator[NetRig]:
    made = NetRig(batching=request.param)
    yield made
    made.close()


@pytest.fixture
def batching() -> Iterator[NetRig]:
    made = NetRig()
    made.until_said()  # that it has started
    yield made
    made.close()


def test_frames_go_both_ways(rig: NetRig) -> None:
    assert rig.receive(b"a frame that arrives") == PLAIN + b"a frame that arrives"
    assert rig.send(b"one that leaves") == HEADER + b"one that leaves"
    assert rig.link_is_up


def test_killed_process_is_a_cable_pulled_and_a_new_one_plugs_it_in(rig: NetRig) -> None:
    rig.send(b"before")
    while not rig.device.statistics.requests:  # what wasn't returned would be sent once more
        rig.until_said()
    interrupts = rig.machine.interrupts

    rig.kill()
    assert not rig.link_is_up
    assert rig.machine.interrupts > interrupts
    assert not rig.machine.driver.status & NEEDS_RESET

    rig.device.restart()
    assert rig.link_is_up
    assert rig.receive(b"after") == PLAIN + b"after"
    assert rig.send(b"after, too") == HEADER + b"after, too"


def test_frame_given_while_there_is_no_process_is_sent_by_the_next(rig: NetRig) -> None:
    rig.kill()
    rig.machine.give(TX, rig.machine.place(HEADER + b"patient"))
    rig.machine.kick(TX)

    rig.device.restart()

    assert rig.sent() == HEADER + b"patient"


def test_connection_of_one_process_is_not_taken_up_by_another() -> None:
    rig = NetRig(restarts=False)

    with pytest.raises(LookupError, match="start the machine again"):
        rig.device.restart()

    assert rig.send(b"still there") == HEADER + b"still there"
    rig.close()


# --- how many messages it takes ---


def until_returned(rig: NetRig, queue: int, chains: int) -> list[tuple[int, int]]:
    """What the driver gets back, once it is so many."""
    found = rig.machine.queues[queue].collect()
    while len(found) < chains:
        rig.until_said()
        found += rig.machine.queues[queue].collect()
    rig.machine.settle()
    return found


def test_frame_that_leaves_takes_two_messages(batching: NetRig) -> None:
    """Its bytes, and what tells the driver; the process rests with that."""
    batching.send(b"the first")
    until_returned(batching, TX, 1)
    batching.said.clear()

    batching.send(b"another one")
    until_returned(batching, TX, 1)

    assert batching.said == [protocol.READ, protocol.RETURN]
    assert not batching.device._kicked


def test_frames_that_leave_together_take_as_many_messages_as_one(batching: NetRig) -> None:
    machine = batching.machine
    for number in range(5):
        machine.give(TX, machine.place(HEADER), machine.place(b"frame %d" % number))
    batching.said.clear()

    machine.kick(TX)

    assert [batching.sent() for _ in range(5)] == [HEADER + b"frame %d" % n for n in range(5)]
    until_returned(batching, TX, 5)
    assert batching.said.count(protocol.READ) == batching.said.count(protocol.RETURN) == 1
    assert batching.device.statistics.requests == 5


def buffers(rig: NetRig, count: int) -> list[Piece]:
    """Offer buffers, and have the process know of them."""
    pieces = [rig.machine.blank(HEADER_SIZE + 100) for _ in range(count)]
    for piece in pieces:
        rig.machine.give(RX, piece)
    rig.machine.kick(RX)
    while RX in rig.device._kicked:
        rig.until_said()
    rig.said.clear()
    return pieces


def test_frame_that_arrives_takes_one_message(batching: NetRig) -> None:
    """Where its buffer is the process knows from the last look."""
    pieces = buffers(batching, 8)

    for number in range(3):
        batching.wire.send(HEADER + b"frame %d" % number)
        until_returned(batching, RX, 1)

    assert [batching.machine.text(piece, 19) for piece in pieces[:3]] == [
        PLAIN + b"frame %d" % number for number in range(3)
    ]
    assert batching.said == [protocol.RETURN] * 3
    assert batching.machine.interrupts == 3
    statistics = batching.device.statistics
    assert (statistics.requests, statistics.bytes_read) == (3, 3 * 7)


def test_buffers_that_the_driver_adds_come_with_what_is_returned(batching: NetRig) -> None:
    """Without a notify of its: it was asked for none."""
    buffers(batching, 4)
    added = batching.machine.blank(HEADER_SIZE + 100)
    batching.machine.give(RX, added)

    for number in range(4):
        batching.wire.send(HEADER + b"frame %d" % number)
        until_returned(batching, RX, 1)
    assert protocol.READ not in batching.said
    batching.wire.send(HEADER + b"the last")
    until_returned(batching, RX, 1)

    assert batching.machine.text(added, 20) == PLAIN + b"the last"


def test_frames_wait_for_a_driver_without_buffers(batching: NetRig) -> None:
    """It is asked for a notify, and gives it."""
    buffers(batching, 1)
    for number in range(2):
        batching.wire.send(HEADER + b"frame %d" % number)
    until_returned(batching, RX, 1)
    last = batching.machine.blank(HEADER_SIZE + 100)
    batching.machine.give(RX, last)

    batching.machine.kick(RX)
    until_returned(batching, RX, 1)

    assert batching.machine.text(last, 19) == PLAIN + b"frame 1"


def test_driver_of_a_card_in_a_process_has_no_indirect_tables(batching: NetRig) -> None:
    """Each table would be one more question."""
    assert not batching.machine.driver.offered_features() & F_INDIRECT_DESC


def test_next_process_goes_on_behind_what_was_received(batching: NetRig) -> None:
    """What the last one knew of buffers is gone with it."""
    pieces = buffers(batching, 4)
    batching.wire.send(HEADER + b"before")
    until_returned(batching, RX, 1)

    batching.kill()
    batching.device.restart()
    batching.wire.send(HEADER + b"after")
    until_returned(batching, RX, 1)

    assert batching.machine.text(pieces[1], 17) == PLAIN + b"after"
