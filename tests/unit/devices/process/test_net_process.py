"""A network card in a process of its own, on a network that the test holds the other end of."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.support.virtio_machine import VirtioMachine
from vmm.devices.process.front_end import ProcessDevice
from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio.net import HEADER_SIZE, RX, TX, VirtioNet
from vmm.devices.virtio.pci_function import DEVICE_CFG

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
    def __init__(self, *, restarts: bool = True) -> None:
        ours, self.wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wire.settimeout(10)
        net = VirtioNet(Wire(ours), MAC)
        self.spawner = Spawner(None)
        number = self.spawner.add(Job(net, [], [ours.fileno()]))
        self.spawner.begin()
        self.device = ProcessDevice(
            net, "net0", number, self.spawner, config_without=net.config_with(link_up=False),
            restarts=restarts,
        )  # fmt: skip
        self.machine = VirtioMachine(self.device)
        self.machine.up()

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


@pytest.fixture
def rig() -> Iterator[NetRig]:
    made = NetRig()
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
