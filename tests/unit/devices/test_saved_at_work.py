"""Devices saved in the middle of their work: what another one over the same rings goes on with."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.moved import Moved
from tests.support.virtio_driver import NEEDS_RESET, Piece
from tests.support.virtio_machine import VirtioMachine
from vmm.core.saved import BadState
from vmm.devices.virtio import console
from vmm.devices.virtio.balloon import DEFLATE, INFLATE, STATS, VirtioBalloon
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.budget import Budget
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.net import (
    F_CSUM,
    F_GUEST_CSUM,
    F_MRG_RXBUF,
    HEADER_SIZE,
    RX,
    TX,
    VirtioNet,
)
from vmm.devices.virtio.net_backend import Passt
from vmm.devices.virtio.rng import VirtioRng
from vmm.devices.virtio.vsock import EVENT, open_vsock
from vmm.devices.virtio.vsock_packet import HEADER_SIZE as PACKET
from vmm.devices.virtio.vsock_packet import TYPE_STREAM, Header, Op

MAC, OTHER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
HEADER = bytes(HEADER_SIZE)
CID, NEW_CID, PORT, HOST_PORT = 42, 43, 1234, 5678
RX0, TX0, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)
PAGE = 4096


@pytest.fixture
def moving() -> Iterator[Callable[..., Moved]]:
    """Makes a `Moved` whose devices are made by these, each in its turn."""
    made: list[Moved] = []

    def build(*makers: Callable[[], Any]) -> Moved:
        left = list(makers)

        def make() -> Any:
            return (left.pop(0) if len(left) > 1 else left[0])()

        made.append(Moved(make))
        return made[-1]

    yield build
    for each in made:
        each.close()


def lines(machine: VirtioMachine) -> tuple[int, int]:
    """Link status and generation, as the driver reads them."""
    status = machine.ports.read(machine.driver.device_config + 6, 2)
    return status, machine.driver.get(0x15, 1)


# --- what every device has ---


def test_driver_that_is_up_without_features_is_refused(moving: Callable[..., Moved]) -> None:
    made = moving(VirtioRng)
    made.old.up()
    state = made.state()
    state["status"] &= ~8
    state["driver_features"] = (1 << 64) - 1

    with pytest.raises(BadState, match="without features agreed on"):
        made.restored(state)


def test_configuration_read_across_the_restore_is_read_anew(moving: Callable[..., Moved]) -> None:
    made = moving(VirtioBalloon)
    made.old.up()
    before = made.old.driver.get(0x15, 1)

    assert made.gone_on().driver.get(0x15, 1) != before


def test_device_that_needs_a_reset_needs_it_still(moving: Callable[..., Moved]) -> None:
    made = moving(lambda: VirtioBalloon(3))
    made.old.up()
    made.old.give(INFLATE, made.old.place(b"odd"))
    made.old.kick(INFLATE)
    assert made.old.driver.status & NEEDS_RESET

    new = made.gone_on()

    assert new.driver.status & NEEDS_RESET
    new.up()
    new.give(INFLATE, new.place(struct.pack("<I", 200)))
    new.kick(INFLATE)
    assert len(new.queues[INFLATE].collect()) == 1, "and works after it"


# --- block, rng ---


def test_each_queue_of_a_disk_goes_on_where_it_was(
    moving: Callable[..., Moved], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(1 << 20))
    made = moving(lambda: VirtioBlock(open_disk(f"{disk},ro,queues=2")))

    def read(machine: VirtioMachine, queue: int, sector: int) -> Piece:
        data = machine.blank(512)
        header = machine.place(struct.pack("<IIQ", 0, 0, sector))
        machine.give(queue, header, data, machine.blank(1))
        return data

    made.old.up()
    for queue, requests in ((0, 3), (1, 5)):
        for sector in range(requests):
            read(made.old, queue, sector)
        made.old.kick(queue)
        assert len(made.old.queues[queue].collect()) == requests
    waiting = [read(made.old, queue, 7 + queue) for queue in (0, 1)]

    new = made.gone_on()

    for queue, data in enumerate(waiting):
        assert len(new.queues[queue].collect()) == 1
        assert new.text(data, 512) == disk.read_bytes()[(7 + queue) * 512 :][:512]


def test_rng_fills_the_buffer_that_waited(moving: Callable[..., Moved]) -> None:
    made = moving(VirtioRng)
    made.old.up()
    made.old.give(0, made.old.blank(64))
    made.old.kick(0)
    assert len(made.old.queues[0].collect()) == 1
    buffer = made.old.blank(64)
    head = made.old.give(0, buffer)

    new = made.gone_on()

    assert new.queues[0].collect() == [(head, 64)]
    assert new.text(buffer, 64) != b"\xcc" * 64


# --- net ---


class Wire:
    """A backend that the test holds the other end of."""

    is_stream = False

    def __init__(self, features: int = 0, room: int = 1 << 30) -> None:
        self.features = features
        self.room = room
        self.sent: list[bytes] = []
        self.coming: list[bytes] = []
        self.offloads = -1
        self.fd = os.eventfd(1)
        self.lost = False

    def set_offloads(self, features: int) -> None:
        self.offloads = features

    def receive(self) -> bytes | None:
        if self.lost:
            raise OSError(errno.ECONNRESET, "gone")
        if self.coming:
            return self.coming.pop(0)
        return None

    def send(self, frame: bytes) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.sent.append(frame[HEADER_SIZE:])
        return True

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        os.close(self.fd)


def cards(moving: Callable[..., Moved], *wires: Wire) -> Moved:
    """A card on the first wire, and then one on each of the others."""
    return moving(*[lambda wire=wire: VirtioNet(wire, MAC) for wire in wires])


def drain(machine: VirtioMachine) -> None:
    """Serve what was rung; nobody looks at the wire's fd, which is always ready."""
    while machine.rung:
        machine.transport.notify(machine.rung.pop(0))


def on_again(made: Moved) -> VirtioMachine:
    new = made.restored(made.state())
    new.transport.resume()
    drain(new)
    return new


def test_card_sends_what_had_to_wait_and_nothing_twice(moving: Callable[..., Moved]) -> None:
    old, new = Wire(room=2), Wire()
    made = cards(moving, old, new)
    made.old.up()
    heads = [made.old.give(TX, made.old.place(HEADER + b"frame %d" % n)) for n in range(5)]
    made.old.driver.notify(TX)
    drain(made.old)
    assert len(made.old.queues[TX].collect()) == 2

    machine = on_again(made)

    assert old.sent == [b"frame 0", b"frame 1"]
    assert new.sent == [b"frame 2", b"frame 3", b"frame 4"]
    assert [head for head, _ in machine.queues[TX].collect()] == heads[2:]


def test_card_fills_the_buffers_that_waited(moving: Callable[..., Moved]) -> None:
    old, new = Wire(), Wire()
    made = cards(moving, old, new)
    made.old.up(refuse=F_MRG_RXBUF)
    buffers = [made.old.blank(128) for _ in range(4)]
    heads = [made.old.give(RX, buffer) for buffer in buffers]
    old.coming += [HEADER + b"first"]
    made.old.driver.notify(RX)
    drain(made.old)
    assert made.old.queues[RX].collect() == [(heads[0], HEADER_SIZE + 5)]
    new.coming += [HEADER + b"second", HEADER + b"third"]

    machine = on_again(made)

    used = machine.queues[RX].collect()
    assert used == [(heads[1], HEADER_SIZE + 6), (heads[2], HEADER_SIZE + 5)]
    assert machine.text(buffers[2], HEADER_SIZE + 5)[HEADER_SIZE:] == b"third"


def test_frame_too_large_for_the_buffers_is_lost_and_they_are_not(
    moving: Callable[..., Moved],
) -> None:
    old, new = Wire(), Wire()
    made = cards(moving, old, new)
    made.old.up()
    buffers = [made.old.blank(64) for _ in range(2)]
    heads = [made.old.give(RX, buffer) for buffer in buffers]
    old.coming += [HEADER + b"x" * 500]
    made.old.driver.notify(RX)
    drain(made.old)
    new.coming += [HEADER + b"small"]

    machine = on_again(made)

    assert machine.queues[RX].collect() == [(heads[0], HEADER_SIZE + 5)]
    assert machine.text(buffers[0], HEADER_SIZE + 5)[HEADER_SIZE:] == b"small"


def test_card_keeps_its_address_and_what_was_agreed_on(moving: Callable[..., Moved]) -> None:
    offered = F_CSUM | F_GUEST_CSUM
    new = Wire(offered)
    made = moving(lambda: VirtioNet(Wire(offered), OTHER_MAC), lambda: VirtioNet(new, MAC))
    made.old.up(refuse=F_CSUM)

    machine = on_again(made)

    read = [machine.ports.read(machine.driver.device_config + at, 1) for at in range(6)]
    assert bytes(read) == OTHER_MAC
    assert new.offloads == F_GUEST_CSUM


def test_card_whose_cable_was_pulled_has_one_again(moving: Callable[..., Moved]) -> None:
    old, new = Wire(), Wire()
    made = cards(moving, old, new)
    made.old.up()
    made.old.give(RX, made.old.blank(64))
    old.lost = True
    made.old.driver.notify(RX)
    drain(made.old)
    before = lines(made.old)
    assert before[0] == 0 and made.old.driver.isr() & 2

    machine = on_again(made)

    link, generation = lines(machine)
    assert link == 1 and generation != before[1]
    assert machine.driver.isr() & 2, "and its driver is to look"


def test_backend_without_the_offloads_agreed_on_is_refused(moving: Callable[..., Moved]) -> None:
    made = cards(moving, Wire(F_CSUM), Wire())
    made.old.up()
    state = made.state()

    with pytest.raises(BadState, match="agreed on features"):
        made.restored(state)


@pytest.mark.parametrize("mac", ["010000000001", "000000000000", "0200000000", "02000000000102"])
def test_address_that_no_card_may_have_is_refused(moving: Callable[..., Moved], mac: str) -> None:
    made = cards(moving, Wire(), Wire())
    made.old.up()
    state = made.state()
    state["device"]["mac"] = mac

    with pytest.raises(BadState, match=r"mac "):
        made.restored(state)


def test_address_that_the_user_gives_has_to_be_the_card_s(moving: Callable[..., Moved]) -> None:
    made = moving(
        lambda: VirtioNet(Wire(), MAC, mac_given=True),
        lambda: VirtioNet(Wire(), OTHER_MAC, mac_given=True),
        lambda: VirtioNet(Wire(), MAC, mac_given=True),
    )
    made.old.up()
    state = made.state()

    with pytest.raises(BadState, match="02:00:00:00:00:01, and --net says mac=02:00:00:00:00:02"):
        made.restored(state)
    made.restored(state)


# --- vsock ---


class Calls:
    """The guest's side of a vsock, before and after."""

    def __init__(self, moving: Callable[..., Moved], folder: Path, new_cid: int = NEW_CID) -> None:
        self.paths = [folder / "old", folder / "new"]
        self.made = moving(
            lambda: open_vsock(f"path={folder}/old,cid={CID}"),
            lambda: open_vsock(f"path={folder}/new,cid={new_cid}"),
        )
        self.machine = self.made.old
        self.machine.up()
        self.buffers: dict[int, Piece] = {}
        for _ in range(8):
            buffer = self.machine.blank(1024)
            self.buffers[self.machine.give(RX, buffer)] = buffer
        self.event = self.machine.blank(4)

    def move(self) -> None:
        self.machine = self.made.gone_on()

    def offer_event(self) -> int:
        return self.machine.give(EVENT, self.event)

    def put(self, op: int, data: bytes = b"", host_port: int = HOST_PORT, cid: int = CID) -> None:
        header = Header(cid, 2, PORT, host_port, len(data), TYPE_STREAM, op, 0, 1 << 16, 0)
        self.machine.give(TX, self.machine.place(header.pack() + data))

    def heard(self) -> list[Header]:
        packets = []
        for head, size in self.machine.queues[RX].collect():
            data = self.machine.text(self.buffers[head], size)
            packets.append(Header.unpack(data[:PACKET]))
        return packets


@pytest.fixture
def calls(moving: Callable[..., Moved], tmp_path: Path) -> Calls:
    return Calls(moving, tmp_path)


def listener(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(f"{path}_{HOST_PORT}")
    made.listen()
    made.setblocking(False)
    return made


def test_guest_hears_that_its_connections_are_gone(calls: Calls) -> None:
    head = calls.offer_event()
    with listener(calls.paths[0]) as there:
        calls.put(Op.REQUEST)
        calls.machine.kick(TX)
        assert [each.op for each in calls.heard()] == [Op.RESPONSE]
        link, _ = there.accept()

        calls.move()

        assert calls.machine.queues[EVENT].collect() == [(head, 4)]
        assert calls.machine.text(calls.event, 4) == bytes(4)  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
        assert calls.machine.ports.read(calls.machine.driver.device_config, 4) == NEW_CID
        calls.put(Op.RW, b"to nobody", cid=NEW_CID)
        calls.machine.kick(TX)
        (answer,) = calls.heard()
        assert (answer.op, answer.dst_port, answer.src_port) == (Op.RST, PORT, HOST_PORT)
        assert select.select([link], [], [], 0)[0] == [], "the old one has its link still"
        link.close()


def test_guest_hears_of_it_once(calls: Calls) -> None:
    calls.offer_event()
    calls.move()
    calls.machine.queues[EVENT].collect()

    calls.offer_event()
    calls.machine.kick(EVENT)

    assert calls.machine.queues[EVENT].collect() == []


def test_call_that_was_on_its_way_waits_until_the_guest_knows(
    moving: Callable[..., Moved], tmp_path: Path
) -> None:
    calls = Calls(moving, tmp_path, new_cid=CID)
    calls.put(Op.REQUEST)
    with listener(calls.paths[1]) as there:
        calls.move()  # no buffer for the event yet
        before = select.select([there], [], [], 0)[0]

        head = calls.machine.give(EVENT, calls.event)
        calls.machine.kick(EVENT)

        assert before == [] and calls.machine.queues[EVENT].collect() == [(head, 4)]
        assert [each.op for each in calls.heard()] == [Op.RESPONSE]
        there.accept()[0].close()


def resets(packets: list[Header]) -> list[tuple[int, ...]]:
    return [(each.op, *each[:4], each.type) for each in packets]


def test_call_whose_answer_was_still_to_come_is_reset_after_the_event(
    moving: Callable[..., Moved], tmp_path: Path
) -> None:
    """Linux' reset of the transport leaves a connect() alone, which would wait for its timeout."""
    calls = Calls(moving, tmp_path)
    while calls.buffers:  # the guest has no buffers left for answers
        calls.put(Op.RST, host_port=1)
        calls.put(Op.REQUEST, host_port=1)
        calls.machine.kick(TX)
        for each in calls.machine.queues[RX].collect():
            del calls.buffers[each[0]]
    with listener(calls.paths[0]) as there:
        calls.put(Op.REQUEST)
        calls.put(Op.REQUEST, host_port=HOST_PORT + 1)  # where nobody listens
        calls.machine.kick(TX)
        there.accept()[0].close()
    again = calls.made.state()["device"]["resets"]

    calls.move()
    buffer = calls.machine.blank(1024)
    for _ in range(3):
        buffer = calls.machine.blank(1024)
        calls.buffers[calls.machine.give(RX, buffer)] = buffer
    calls.machine.kick(RX)
    before = calls.heard()
    calls.offer_event()
    calls.machine.kick(EVENT)

    assert before == [], "the event comes first"
    assert again == [[2, HOST_PORT, PORT, TYPE_STREAM], [2, HOST_PORT + 1, PORT, TYPE_STREAM]]
    assert resets(calls.heard()) == [
        (Op.RST, 2, NEW_CID, HOST_PORT, PORT, TYPE_STREAM),
        (Op.RST, 2, NEW_CID, HOST_PORT + 1, PORT, TYPE_STREAM),
    ]


def test_call_from_the_address_that_the_guest_had_is_reset(calls: Calls) -> None:
    calls.offer_event()
    calls.put(Op.REQUEST)
    calls.put(Op.RW, b"to nobody")
    calls.put(Op.REQUEST, cid=CID + 7)

    with listener(calls.paths[1]) as there:
        calls.move()
        assert select.select([there], [], [], 0)[0] == []

    assert resets(calls.heard()) == [(Op.RST, 2, NEW_CID, HOST_PORT, PORT, TYPE_STREAM)]


def test_established_connection_gets_no_reset_beside_the_event(calls: Calls) -> None:
    """To Linux that is the stream's end, as if all of it had come."""
    calls.offer_event()
    with listener(calls.paths[0]) as there:
        calls.put(Op.REQUEST)
        calls.machine.kick(TX)
        assert [each.op for each in calls.heard()] == [Op.RESPONSE]
        there.accept()[0].close()

    calls.move()

    assert calls.heard() == []


def test_more_resets_than_the_guest_may_have_unsent_are_all_sent(
    moving: Callable[..., Moved], tmp_path: Path
) -> None:
    calls = Calls(moving, tmp_path)
    calls.offer_event()
    state = calls.made.state()
    state["device"]["resets"] = [[2, HOST_PORT, port, TYPE_STREAM] for port in range(140)]
    with listener(calls.paths[1]) as there:
        calls.machine = calls.made.restored(state)
        calls.machine.transport.resume()
        calls.machine.settle()
        calls.put(Op.REQUEST, cid=NEW_CID)
        calls.machine.kick(TX)
        found: list[Header] = []
        while packets := calls.heard():
            found += packets
            for _ in packets:
                buffer = calls.machine.blank(1024)
                calls.buffers[calls.machine.give(RX, buffer)] = buffer
            calls.machine.kick(RX)
        there.accept()[0].close()

    assert [each.dst_port for each in found] == [*range(140), PORT]
    assert [each.op for each in found] == [Op.RST] * 140 + [Op.RESPONSE]


def test_host_s_caller_waits_until_the_guest_knows(calls: Calls) -> None:
    calls.move()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(calls.paths[1]))
        client.sendall(b"CONNECT %d\n" % PORT)
        calls.machine.settle()  # which costs no processor meanwhile
        assert calls.heard() == []

        calls.offer_event()
        calls.machine.kick(EVENT)

        assert [each.op for each in calls.heard()] == [Op.REQUEST]


def test_new_call_has_no_port_that_an_old_one_had(calls: Calls) -> None:
    def call(path: Path) -> int:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"CONNECT %d\n" % PORT)
            calls.machine.settle()
            calls.machine.kick(RX)
            (header,) = [each for each in calls.heard() if each.op == Op.REQUEST]
            return header.src_port

    calls.offer_event()
    first = call(calls.paths[0])
    calls.move()

    assert call(calls.paths[1]) == first + 1


def test_driver_that_begins_anew_is_told_nothing(calls: Calls) -> None:
    calls.move()

    calls.machine.up()
    calls.offer_event()
    calls.machine.kick(EVENT)

    assert calls.machine.queues[EVENT].collect() == []


# --- balloon ---


def test_inflation_in_steps_is_done_and_deflation_goes_on(moving: Callable[..., Moved]) -> None:
    made = moving(lambda: VirtioBalloon(64), VirtioBalloon)
    old = made.old
    old.up()
    gone = 0x80000 // PAGE
    pages = list(range(gone, gone + 128, 2))  # each of them a run by itself
    queue = old.transport._active[INFLATE].queue
    queue.budget = Budget(count().__next__)  # a second has passed at every look
    old.memory.poke(b"\xaa" * (128 * PAGE), gone * PAGE)
    old.give(INFLATE, old.place(struct.pack(f"<{len(pages)}I", *pages)))
    old.driver.notify(INFLATE)
    old.transport.notify(old.rung.pop(0))
    assert queue.unfinished is not None, "else this test tries nothing"
    old.ports.write(old.driver.device_config + 4, 4, 64)

    new = made.gone_on()

    assert len(new.queues[INFLATE].collect()) == 1
    assert new.text(Piece(gone * PAGE, PAGE), PAGE) == bytes(PAGE)
    assert new.text(Piece((gone + 127) * PAGE, 1), 1) == b"\xaa"
    config = new.driver.device_config
    assert [new.ports.read(config + at, 4) for at in (0, 4)] == [64, 64]
    new.give(DEFLATE, new.place(struct.pack("<2I", gone, gone + 2)))
    new.kick(DEFLATE)
    assert len(new.queues[DEFLATE].collect()) == 1
    device = new.device
    assert isinstance(device, VirtioBalloon)
    device.resize(32)
    assert new.ports.read(config, 4) == 32 and new.driver.isr() & 2


def test_statistics_asked_for_before_are_nobody_s_and_later_ones_are_heard(
    moving: Callable[..., Moved],
) -> None:
    made = moving(lambda: VirtioBalloon(1))
    old = made.old
    old.up()
    buffer = old.place(struct.pack("<HQ", 4, 77))
    head = old.give(STATS, buffer)
    old.kick(STATS)
    assert isinstance(old.device, VirtioBalloon)
    old.device.ask()
    old.settle()
    assert old.queues[STATS].collect() == [(head, 0)]

    new = made.gone_on()
    heard: list[dict[str, int]] = []
    assert isinstance(new.device, VirtioBalloon)
    new.device.heard = heard.append
    new.give(STATS, buffer)  # the guest's answer to who has gone
    new.kick(STATS)
    assert heard == []
    new.device.ask()
    new.settle()
    (used,) = new.queues[STATS].collect()
    new.memory.poke(struct.pack("<HQ", 4, 78), buffer.gpa)
    new.give(STATS, buffer)
    new.kick(STATS)

    assert used[1] == 0 and heard == [{"free_memory": 78}]


@pytest.mark.parametrize("asked", [16, 127])
def test_statistics_buffer_outside_of_its_ring_is_refused(
    moving: Callable[..., Moved], asked: int
) -> None:
    made = moving(lambda: VirtioBalloon(1))
    made.old.up(size=16)
    made.old.give(STATS, made.old.place(struct.pack("<HQ", 4, 77)))
    made.old.kick(STATS)
    state = made.state()
    state["device"]["asked"] = asked

    with pytest.raises(BadState, match=f"statistics buffer {asked} is none that was taken"):
        made.restored(state)


def test_statistics_buffer_that_was_not_taken_is_refused(moving: Callable[..., Moved]) -> None:
    made = moving(lambda: VirtioBalloon(1))
    made.old.up()
    state = made.state()
    state["device"]["asked"] = 0

    with pytest.raises(BadState, match="none that was taken"):
        made.restored(state)


# --- console ---


class Ports:
    """A console and a plain port on a socket each, whose driver is up; before and after."""

    def __init__(self, moving: Callable[..., Moved], folder: Path) -> None:
        self.paths = [folder / "old", folder / "new"]
        self.made = moving(*[self._maker(path) for path in self.paths])
        self.machine = self.made.old
        self.machine.up(size=32)

    @staticmethod
    def _maker(path: Path) -> Callable[[], Any]:
        return lambda: open_console((f"file={path}.out", f"socket={path},name=n"))

    def move(self) -> None:
        self.machine = self.made.gone_on()

    def say(self, port: int, event: int, value: int) -> None:
        message = self.machine.place(struct.pack("<IHH", port, event, value))
        self.machine.give(CONTROL_TX, message)
        self.machine.kick(CONTROL_TX)

    def heard(self, count: int = 8) -> list[tuple[int, ...]]:
        """Messages, for which there are buffers from now on."""
        buffers = {}
        for _ in range(count):
            piece = self.machine.blank(80)
            buffers[self.machine.give(CONTROL_RX, piece)] = piece
        self.machine.kick(CONTROL_RX)
        used = self.machine.queues[CONTROL_RX].collect()
        return [struct.unpack("<IHH", self.machine.text(buffers[head], 8)) for head, _ in used]


@pytest.fixture
def ports(moving: Callable[..., Moved], tmp_path: Path) -> Ports:
    return Ports(moving, tmp_path)


def dial(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.setblocking(False)
    return client


def test_messages_that_had_no_buffer_are_told_after_the_restore(ports: Ports) -> None:
    ports.say(0xFFFF_FFFF, console.DEVICE_READY, 1)
    ports.say(0, console.PORT_READY, 1)

    ports.move()

    assert ports.heard() == [
        (0, console.PORT_ADD, 1),
        (1, console.PORT_ADD, 1),
        (0, console.CONSOLE_PORT, 1),
        (0, console.PORT_OPEN, 1),
    ]


def test_guest_hears_that_who_was_at_a_port_is_gone_and_who_comes(ports: Ports) -> None:
    ports.say(1, console.PORT_READY, 1)
    ports.say(1, console.PORT_OPEN, 1)
    with dial(ports.paths[0]):
        ports.machine.settle()
        assert (1, console.PORT_OPEN, 1) in ports.heard(2)

        ports.machine.give(RX1, buffer := ports.machine.blank(64))
        ports.move()
        told = ports.heard(1)
        with dial(ports.paths[1]) as client:
            client.sendall(b"typed")
            ports.machine.settle()
            told += ports.heard(1)

        assert told == [(1, console.PORT_OPEN, 0), (1, console.PORT_OPEN, 1)]
        assert [size for _, size in ports.machine.queues[RX1].collect()] == [5]
        assert ports.machine.text(buffer, 5) == b"typed"


def test_output_that_had_to_wait_is_written_by_the_next_and_once(ports: Ports) -> None:
    ports.say(1, console.PORT_OPEN, 1)
    pieces = [bytes([number]) * 60000 for number in range(8)]
    with dial(ports.paths[0]) as first:
        for piece in pieces:
            ports.machine.give(TX1, ports.machine.place(piece))
        ports.machine.kick(TX1)
        written = len(ports.machine.queues[TX1].collect())
        assert 0 < written < len(pieces), "else this test tries nothing"

        new = ports.made.restored(ports.made.state())
        with dial(ports.paths[1]) as second:
            new.transport.resume()
            said = b""
            while len(said) < 60000 * (len(pieces) - written):
                new.settle()
                said += second.recv(1 << 20)
        assert first.recv(1) == b"\0"

    assert said == b"".join(pieces[written:])
    assert len(new.queues[TX1].collect()) == len(pieces) - written


def test_console_s_output_goes_on(ports: Ports) -> None:
    ports.say(0, console.PORT_OPEN, 1)
    ports.machine.give(TX0, ports.machine.place(b"before"))
    ports.machine.kick(TX0)
    ports.machine.give(TX0, ports.machine.place(b"after"))

    ports.move()

    assert ports.paths[0].with_name("old.out").read_bytes() == b"before"
    assert ports.paths[1].with_name("new.out").read_bytes() == b"after"


def test_port_of_another_name_is_refused(moving: Callable[..., Moved], tmp_path: Path) -> None:
    made = moving(
        lambda: open_console((f"file={tmp_path}/a", f"file={tmp_path}/b,name=one")),
        lambda: open_console((f"file={tmp_path}/a", f"file={tmp_path}/b,name=two")),
        lambda: open_console((f"file={tmp_path}/a", f"file={tmp_path}/b")),
    )
    made.old.up()
    state = made.state()

    with pytest.raises(BadState, match=r"ports\[1\]: its name is 'one', and --console has 'two' "):
        made.restored(state)
    with pytest.raises(BadState, match="'one', and --console has none there"):
        made.restored(state)


def test_passt_without_a_frame_in_the_middle(moving: Callable[..., Moved]) -> None:
    """The stream to a new passt begins with a frame, whatever the old one had half of."""
    pairs = [socket.socketpair() for _ in range(2)]
    made = moving(*[lambda ours=ours: VirtioNet(Passt(ours), MAC) for ours, _ in pairs])
    made.old.up()
    big = made.old.place(HEADER + b"x" * 60000)
    for _ in range(12):
        made.old.give(TX, big)
    made.old.kick(TX)
    taken = len(made.old.queues[TX].collect())
    assert 0 < taken < 12, "else this test tries nothing"

    new = made.restored(made.state())
    new.transport.resume()
    said = b""
    theirs = pairs[1][1]
    theirs.setblocking(False)
    while len(said) < (12 - taken) * 60004:
        new.settle()
        said += theirs.recv(1 << 20)

    assert said == (struct.pack(">I", 60000) + b"x" * 60000) * (12 - taken)
    for _, theirs in pairs:
        theirs.close()
