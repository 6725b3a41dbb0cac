"""A vsock in a process of its own, with programs of the host on real Unix sockets."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fake_memory import BatchingFakeMemory, FakeMemory
from tests.support.virtio_driver import NEEDS_RESET, Piece
from tests.support.virtio_machine import MEMORY
from tests.support.vsock_guest import CID, HOST_PORT, PORT, Guest, dial
from vmm.core.ranges import Range
from vmm.devices.process.dialing import Dialing, answered, asked
from vmm.devices.process.front_end import ProcessDevice
from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio.vsock import EVENT, TX, open_vsock
from vmm.devices.virtio.vsock_packet import Header, Op
from vmm.sandbox.device import enter_device

TRANSPORT_RESET = bytes(4)


class VsockRig(Guest):
    """The guest of a vsock whose process is a real one, in its sandbox."""

    def __init__(self, path: Path, memory: FakeMemory | None = None) -> None:
        vsock = open_vsock(f"path={path},cid={CID},process")
        self.spawner = Spawner(enter_device)
        job = Job(
            vsock, [], vsock.listener.descriptors,
            accepts=True, dialing=Dialing(vsock.dial, vsock.dial_by),
        )  # fmt: skip
        number = self.spawner.add(job)
        self.spawner.begin()
        self.device = ProcessDevice(
            vsock, "vsock", number, self.spawner, events_without=[vsock.connections_gone]
        )
        super().__init__(path, device=self.device, memory=memory)
        self._event_buffers: dict[int, Piece] = {}

    def close(self) -> None:
        self.machine.close()
        self.spawner.close()

    def until_said(self) -> None:
        """Wait for a word of the process, and what it brings about."""
        assert self.machine.loop.wait(10), "the process says nothing"
        self.machine.settle()

    def hears(self, count: int = 1) -> list[tuple[Header, bytes]]:
        """The next packets."""
        packets = self.heard()
        while len(packets) < count:
            self.until_said()
            packets += self.heard()
        return packets

    def hears_op(self) -> int:
        ((header, _),) = self.hears()
        return header.op

    def called(self, client: socket.socket) -> int:
        """A program of the host connects to the guest, which accepts; the host's port."""
        client.sendall(b"CONNECT %d\n" % PORT)
        ((header, _),) = self.hears()
        assert (header.op, header.dst_port) == (Op.REQUEST, PORT)
        self.say(Op.RESPONSE, host_port=header.src_port)
        assert self.received(client) == b"OK %d\n" % header.src_port
        return header.src_port

    def offer_event(self) -> None:
        piece = self.machine.blank(4)
        self._event_buffers[self.machine.give(EVENT, piece)] = piece
        self.machine.kick(EVENT)

    def events(self) -> list[bytes]:
        return [
            self.machine.text(self._event_buffers[head], size)
            for head, size in self.machine.queues[EVENT].collect()
        ]

    def kill(self) -> None:
        os.kill(self.device.statistics.pid, signal.SIGKILL)
        deaths = self.device.statistics.deaths
        self.until(lambda: self.device.statistics.deaths > deaths)

    def received(self, link: socket.socket) -> bytes:
        """What a program of the host gets next; the process is served meanwhile."""
        while True:
            fds: list[socket.socket | int] = [link, *self.machine.loop.wanted]
            ready, _, _ = select.select(fds, [], [], 10)
            assert ready, "nothing comes"
            self.machine.settle()
            if link in ready:
                return link.recv(100)

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.until_said()


@pytest.fixture(params=[BatchingFakeMemory, FakeMemory])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[VsockRig]:
    """On memory with verbs for many pieces, and on one that is read piece by piece."""
    made = VsockRig(tmp_path / "v", request.param(MEMORY))
    made.up()
    yield made
    made.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    """Listens where the guest's connections to HOST_PORT arrive."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(10)
        listener.bind(f"{tmp_path / 'v'}_{HOST_PORT}")
        listener.listen()
        yield listener


def talk(rig: VsockRig, server: socket.socket) -> None:
    """The guest connects to the host's program, and both say something."""
    rig.say(Op.REQUEST)
    assert rig.hears_op() == Op.RESPONSE
    link, _ = server.accept()
    with link:
        rig.say(Op.RW, b"from the guest")
        assert rig.received(link) == b"from the guest"
        link.sendall(b"from the host")
        ((header, data),) = rig.hears()
        assert (header.op, data) == (Op.RW, b"from the host")


def test_host_s_program_reaches_the_guest_through_the_process(rig: VsockRig) -> None:
    with dial(rig.path) as client:
        port = rig.called(client)

        rig.say(Op.RW, b"hello", host_port=port)

        assert rig.received(client) == b"hello"


def test_guest_s_call_is_put_through_from_outside_the_process(
    rig: VsockRig, server: socket.socket
) -> None:
    talk(rig, server)
    rig.until(lambda: rig.device.statistics.bytes_read == len(b"from the host"))
    assert rig.device.statistics.bytes_written == len(b"from the guest")


def test_guest_s_call_to_a_port_where_nobody_listens_is_reset(rig: VsockRig) -> None:
    rig.say(Op.REQUEST)

    assert rig.hears_op() == Op.RST


def test_killed_process_resets_connections_by_an_event_and_the_device_stays(
    rig: VsockRig,
) -> None:
    rig.offer_event()
    with dial(rig.path) as client:
        rig.called(client)
        interrupts = rig.machine.interrupts

        rig.kill()

        assert rig.events() == [TRANSPORT_RESET]
        assert rig.machine.interrupts > interrupts
        assert rig.received(client) == b""
    assert not rig.machine.driver.status & NEEDS_RESET


def test_event_waits_for_a_buffer_and_is_told_once(rig: VsockRig) -> None:
    rig.kill()
    assert rig.events() == []

    rig.offer_event()
    assert rig.events() == [TRANSPORT_RESET]
    rig.offer_event()
    assert rig.events() == []


def test_event_of_before_a_reset_is_not_owed_to_the_next_driver(rig: VsockRig) -> None:
    rig.kill()
    rig.machine.driver.status = 0
    rig.up()

    rig.offer_event()

    assert rig.events() == []


def test_private_event_buffer_stops_a_device_without_a_process(rig: VsockRig) -> None:
    piece = rig.machine.blank(4)
    rig.machine.give(EVENT, piece)
    rig.machine.memory.private.append(Range(piece.gpa & ~0xFFF, 0x1000))

    rig.kill()

    assert rig.machine.driver.status & NEEDS_RESET
    assert rig.device.statistics.refused == 1


def test_new_process_goes_on_and_tells_that_connections_are_gone(
    rig: VsockRig, server: socket.socket
) -> None:
    rig.offer_event()
    with dial(rig.path) as client:
        rig.called(client)
        # What wasn't returned would be taken once more.
        rig.until(lambda: rig.machine.queues[TX].used_index() == 1)

        rig.device.restart()  # of a process that is there

        rig.until(lambda: rig.machine.queues[EVENT].used_index() == 1)
        assert rig.events() == [TRANSPORT_RESET]
        assert rig.received(client) == b""
    talk(rig, server)
    counts = rig.device.statistics.as_dict()["process"]
    assert (counts["deaths"], counts["restarts"]) == (0, 1)


def test_call_of_while_there_is_no_process_is_the_next_one_s(
    rig: VsockRig, server: socket.socket
) -> None:
    rig.kill()
    rig.say(Op.REQUEST)
    with dial(rig.path) as client:
        client.sendall(b"CONNECT %d\n" % PORT)

        rig.device.restart()
        rig.offer_event()  # nothing begins before the guest has learned that all else has ended

        ops = {header.op for header, _ in rig.hears(2)}
    assert ops == {Op.RESPONSE, Op.REQUEST}
    server.accept()[0].close()


def test_process_that_is_killed_twice_is_started_twice(
    rig: VsockRig, server: socket.socket
) -> None:
    for _ in range(2):
        rig.kill()
        rig.device.restart()
        rig.offer_event()
        talk(rig, server)

    counts = rig.device.statistics.as_dict()["process"]
    assert (counts["deaths"], counts["restarts"]) == (2, 2)


# --- connections made from outside ---


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    asking, answering = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with asking, answering:
        yield asking, answering


def nobody(number: int) -> socket.socket:
    raise AssertionError(f"asked for {number}")


@pytest.mark.parametrize("question", [b"abc", b"../xx", bytes(8)])
def test_question_that_is_no_number_ends_them(
    pair: tuple[socket.socket, socket.socket], question: bytes
) -> None:
    asking, answering = pair
    asking.send(question)

    assert not answered(answering, nobody)


def test_process_that_is_gone_or_silent_is_asked_nothing(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    asking, answering = pair

    assert answered(answering, nobody)
    asking.close()
    assert not answered(answering, nobody)


def test_process_that_takes_no_sockets_is_given_no_more(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """What lies in its socket is bounded, and nobody waits for it."""
    asking, answering = pair
    answering.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    given = 0
    asking.send(struct.pack("=I", 7))

    while answered(answering, lambda _: socket.socket(socket.AF_UNIX)):
        given += 1
        assert given < 1000
        asking.send(struct.pack("=I", 7))

    assert given > 0


def test_error_reaches_who_asked_by_its_number(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    asking, answering = pair

    def too_many(number: int) -> socket.socket:
        raise OSError(errno.EMFILE, "")

    asking.send(struct.pack("=I", 7))
    assert answered(answering, too_many)

    with pytest.raises(OSError, match="Too many open files"):
        asked(asking, 7)  # which gets the answer to the first one


def test_answer_that_could_not_be_taken_is_not_the_next_questions(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the guest's next call would reach another program than the one that it asked for."""
    asking, answering = pair

    def no_memory(*_: object) -> object:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(socket, "recv_fds", no_memory)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            asked(asking, 7)
    with socket.socket(socket.AF_UNIX) as other:
        answered(answering, lambda _: other)

    with pytest.raises(OSError):
        asked(asking, 8)


def test_who_asks_nobody_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    asking, answering = pair
    answering.shutdown(socket.SHUT_WR)  # it takes the question, and that is all

    with pytest.raises(ConnectionRefusedError):
        asked(asking, 7)
