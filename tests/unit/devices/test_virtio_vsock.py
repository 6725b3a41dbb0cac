"""virtio-vsock from the guest's side, with programs of the host on real Unix sockets."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.virtio_driver import NEEDS_RESET, Piece, VirtioQueueDriver
from tests.support.vsock_guest import CID, CREDIT, HOST_PORT, PORT, Guest, dial
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.devices.virtio import vsock
from vmm.devices.virtio.budget import TURN_CALLS, Budget
from vmm.devices.virtio.vsock import RX, TX, open_vsock
from vmm.devices.virtio.vsock_connection import BUFFER
from vmm.devices.virtio.vsock_packet import (
    HEADER_SIZE,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    Header,
    Op,
)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path / "v")
    made.up()
    yield made
    made.machine.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    """Listens where the guest's connections to HOST_PORT arrive."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path / 'v'}_{HOST_PORT}")
        listener.listen()
        yield listener


def accepted(guest: Guest, server: socket.socket) -> socket.socket:
    guest.say(Op.REQUEST)
    assert guest.ops() == [Op.RESPONSE]
    link, _ = server.accept()
    link.setblocking(False)
    return link


def closed(link: socket.socket) -> bool:
    try:
        return link.recv(1) == b""
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False


def test_vsock_config_is_the_guests_address(guest: Guest) -> None:
    driver = guest.machine.driver

    assert guest.machine.ports.read(driver.device_config, 4) == CID
    assert guest.machine.ports.read(driver.device_config + 4, 4) == 0


def test_vsock_host_program_reaches_a_guests_port(guest: Guest) -> None:
    with dial(guest.path) as client:
        host_port = guest.called_by(client)

        client.sendall(b"to the guest")
        guest.machine.settle()
        ((header, data),) = guest.heard()
        assert (header.op, data) == (Op.RW, b"to the guest")
        assert (header.src_cid, header.src_port) == (2, host_port)
        assert (header.dst_cid, header.dst_port) == (CID, PORT)

        guest.say(Op.RW, b"to the host", host_port=host_port)
        assert client.recv(100) == b"to the host"


def test_vsock_bytes_behind_the_connect_line_are_the_guests(guest: Guest) -> None:
    with dial(guest.path) as client:
        client.sendall(b"CONNECT 1234\nhello")
        guest.machine.settle()
        ((header, _),) = guest.heard()
        guest.say(Op.RESPONSE, host_port=header.src_port)

        assert [data for _, data in guest.heard()] == [b"hello"]


def test_vsock_caller_that_speaks_slowly_costs_nothing_meanwhile(guest: Guest) -> None:
    with dial(guest.path) as client:
        for piece in (b"CONN", b"ECT 12", b"34", b"\nhel"):
            client.sendall(piece)
            guest.machine.settle()

        assert guest.ops() == [Op.REQUEST]


@pytest.mark.parametrize(
    "line", [b"CONNECT\n", b"CONNECT -1\n", b"CONNECT 4294967296\n", b"GET / HTTP/1.1\r\n",
             b"x" * 32, b"\n"]
)  # fmt: skip
def test_vsock_caller_that_says_something_else_is_hung_up(guest: Guest, line: bytes) -> None:
    with dial(guest.path) as client:
        client.sendall(line)
        guest.machine.settle()

        assert closed(client)
        assert guest.heard() == []


def test_vsock_port_where_nobody_listens_in_the_guest(guest: Guest) -> None:
    with dial(guest.path) as client:
        client.sendall(b"CONNECT 99\n")
        guest.machine.settle()
        ((header, _),) = guest.heard()

        guest.say(Op.RST, port=99, host_port=header.src_port)

        assert closed(client)
        assert guest.heard() == []


def test_vsock_guest_reaches_a_host_program(guest: Guest, server: socket.socket) -> None:
    with accepted(guest, server) as link:
        guest.say(Op.RW, b"question")
        assert link.recv(100) == b"question"
        link.sendall(b"answer")
        guest.machine.settle()
        assert [data for _, data in guest.heard()] == [b"answer"]


def test_vsock_port_where_nobody_listens_on_the_host_is_reset(guest: Guest) -> None:
    guest.say(Op.REQUEST, host_port=99)

    ((header, _),) = guest.heard()
    assert header.op == Op.RST
    assert (header.src_port, header.dst_port) == (99, PORT)


def test_vsock_host_sends_no_more_than_the_guest_has_room_for(
    guest: Guest, server: socket.socket
) -> None:
    with accepted(guest, server) as link:
        guest.say(Op.CREDIT_UPDATE, buf_alloc=5000)
        link.sendall(bytes(20000))
        guest.machine.settle()
        assert sum(len(data) for _, data in guest.heard()) == 5000
        assert link.fileno() not in guest.machine.loop.wanted

        guest.forwarded = 3000
        guest.say(Op.CREDIT_UPDATE, buf_alloc=5000)
        assert sum(len(data) for _, data in guest.heard()) == 3000


def test_vsock_guest_that_sends_more_than_it_may_is_reset(
    guest: Guest, server: socket.socket
) -> None:
    with accepted(guest, server) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        block = bytes(60000)
        for _ in range(20):
            guest.say(Op.RW, block)

        assert Op.RST in guest.ops()
        device = guest.machine.device
        assert isinstance(device, vsock.VirtioVsock)
        assert device._connections == {}


def test_vsock_guest_hears_that_there_is_room_again(guest: Guest, server: socket.socket) -> None:
    with accepted(guest, server) as link:
        block = bytes(50000)
        received = 0
        for _ in range(BUFFER // len(block)):
            guest.say(Op.RW, block)
        while True:
            try:
                received += len(link.recv(1 << 20))
            except BlockingIOError:
                break
            guest.machine.settle()

        updates = [header for header, _ in guest.heard() if header.op == Op.CREDIT_UPDATE]
        assert received == BUFFER // len(block) * len(block)
        assert updates and updates[-1].fwd_cnt >= received - BUFFER // 4
        assert updates[-1].buf_alloc == BUFFER


def test_vsock_credit_request_is_answered(guest: Guest, server: socket.socket) -> None:
    with accepted(guest, server):
        guest.say(Op.RW, b"12345")
        guest.say(Op.CREDIT_REQUEST)

        ((header, _),) = guest.heard()
        assert (header.op, header.fwd_cnt) == (Op.CREDIT_UPDATE, 5)


def test_vsock_half_closed_by_the_host_still_takes_data(
    guest: Guest, server: socket.socket
) -> None:
    with accepted(guest, server) as link:
        link.sendall(b"all")
        link.shutdown(socket.SHUT_WR)
        guest.machine.settle()
        packets = guest.heard()
        assert [header.op for header, _ in packets] == [Op.RW, Op.SHUTDOWN]
        assert packets[1][0].flags == SHUTDOWN_SEND

        guest.say(Op.RW, b"late answer")
        assert link.recv(100) == b"late answer"
        guest.say(Op.SHUTDOWN, flags=SHUTDOWN_SEND | SHUTDOWN_RECEIVE)
        assert guest.ops() == [Op.RST]
        assert closed(link)
        assert guest.machine.device.statistics.errors == 0


def test_vsock_half_closed_by_the_guest_still_gets_data(
    guest: Guest, server: socket.socket
) -> None:
    with accepted(guest, server) as link:
        guest.say(Op.RW, b"question")
        guest.say(Op.SHUTDOWN, flags=SHUTDOWN_SEND)
        assert link.recv(100) == b"question"
        assert link.recv(100) == b""

        link.sendall(b"answer")
        link.close()
        guest.machine.settle()
        assert [(h.op, d) for h, d in guest.heard()] == [(Op.RW, b"answer"), (Op.SHUTDOWN, b"")]


def test_vsock_slow_program_gets_all_that_a_guest_sent_before_it_let_go(
    guest: Guest, server: socket.socket
) -> None:
    """Linux waits for 8 s after it has closed its end."""
    with accepted(guest, server) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        device: Any = guest.machine.device
        connection = next(iter(device._connections.values()))
        connection.link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        sent = b""
        while not connection.waiting:
            sent += bytes([len(sent) % 251]) * 4000
            guest.say(Op.RW, sent[-4000:])
        guest.say(Op.SHUTDOWN, flags=SHUTDOWN_SEND | SHUTDOWN_RECEIVE)
        guest.say(Op.RST)

        taken = b""
        while piece := link.recv(1 << 16):
            taken += piece
            guest.machine.settle()

        assert taken == sent
        assert not device._connections


def test_vsock_host_program_that_is_gone_is_a_reset(guest: Guest, server: socket.socket) -> None:
    with accepted(guest, server):
        pass
    guest.machine.settle()
    guest.heard()

    guest.say(Op.RW, b"anybody there?")

    assert guest.ops() == [Op.RST]


@pytest.mark.parametrize(
    ("op", "cid", "kind"),
    [
        (Op.RESPONSE, 3, TYPE_STREAM),
        (Op.RESPONSE, 2, 2),
        (Op.RW, 2, TYPE_STREAM),
        (0, 2, TYPE_STREAM),
        (99, 2, TYPE_STREAM),
        (Op.SHUTDOWN, 2, TYPE_STREAM),
    ],
)
def test_vsock_packet_for_nobody_is_reset(guest: Guest, op: int, cid: int, kind: int) -> None:
    guest.say(op, dst_cid=cid, type=kind)

    assert guest.ops() == [Op.RST]
    assert not guest.machine.driver.status & NEEDS_RESET


def test_vsock_reset_for_nobody_is_not_answered(guest: Guest) -> None:
    guest.say(Op.RST)

    assert guest.heard() == []


def test_vsock_packet_from_another_address_is_dropped(guest: Guest) -> None:
    guest.say(Op.REQUEST, src_cid=7)

    assert guest.heard() == []


@pytest.mark.parametrize("op", [0, Op.REQUEST, Op.RESPONSE, 8, 65535])
def test_vsock_nonsense_on_a_connection_ends_it(
    guest: Guest, server: socket.socket, op: int
) -> None:
    with accepted(guest, server) as link:
        guest.say(op)

        assert guest.ops() == [Op.RST]
        assert closed(link)


@pytest.mark.parametrize("length", [1, 4096, 0xFFFF_FFFF])
def test_vsock_length_that_is_not_there_stops_the_device(guest: Guest, length: int) -> None:
    guest.say(Op.RW, length=length)

    assert guest.machine.driver.status & NEEDS_RESET


def test_vsock_stopped_device_lets_go_of_its_connections(
    guest: Guest, server: socket.socket
) -> None:
    with accepted(guest, server) as link:
        guest.say(Op.RW, length=77)

        assert closed(link)
        assert guest.machine.loop.wanted == {}


def test_vsock_resets_that_the_guest_does_not_fetch_hold_it_back(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "MOST_RESETS", 32)
    guest.machine.up(size=128)
    header = Header(CID, 2, 1, 2, 0, TYPE_STREAM, Op.RW, 0, 0, 0)
    piece = guest.machine.place(header.pack())
    for _ in range(100):
        guest.machine.give(TX, piece)
    guest.machine.kick(TX)

    device = guest.machine.device
    assert isinstance(device, vsock.VirtioVsock)
    assert len(device._resets) == vsock.MOST_RESETS
    assert len(guest.machine.queues[TX].collect()) == vsock.MOST_RESETS

    answers = 0
    for _ in range(10):
        for _ in range(50):
            guest.machine.give(RX, Piece(0xE0000, 64, True))
        guest.machine.kick(RX)
        answers += len(guest.machine.queues[RX].collect())
    assert answers == 100


def test_vsock_private_packet_is_refused_and_counted(guest: Guest) -> None:
    guest.machine.memory.private.append(Range(0xD0000, 4096))
    guest.machine.give(TX, Piece(0xD0000, HEADER_SIZE))

    guest.machine.kick(TX)

    assert guest.machine.driver.status & NEEDS_RESET
    assert guest.machine.device.statistics.refused == 1


def test_vsock_receive_buffer_smaller_than_a_header_stops_the_device(tmp_path: Path) -> None:
    guest = Guest(tmp_path / "v", rx_size=HEADER_SIZE - 1)
    guest.up()

    guest.say(Op.RW)

    assert guest.machine.driver.status & NEEDS_RESET
    guest.machine.close()


def test_vsock_guest_that_calls_as_often_as_it_may_leaves_places_for_the_host(
    guest: Guest, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "MOST_CONNECTIONS", 4)
    monkeypatch.setattr(vsock, "HOST_PLACES", 1)
    links = []
    for port in range(3):
        guest.say(Op.REQUEST, port=port)
        links.append(server.accept()[0])
        assert guest.ops() == [Op.RESPONSE]

    guest.say(Op.REQUEST, port=3)
    assert guest.ops() == [Op.RST]
    with dial(guest.path) as client:
        client.sendall(b"CONNECT 9\n")
        guest.machine.settle()

        assert guest.ops() == [Op.REQUEST]
    for link in links:
        link.close()


def test_vsock_more_connections_than_there_may_be(
    guest: Guest, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "MOST_CONNECTIONS", 3)
    monkeypatch.setattr(vsock, "HOST_PLACES", 0)
    links = []
    for port in range(3):
        guest.say(Op.REQUEST, port=port)
        links.append(server.accept()[0])
        assert guest.ops() == [Op.RESPONSE]

    guest.say(Op.REQUEST, port=3)
    assert guest.ops() == [Op.RST]
    with dial(guest.path) as client:
        guest.machine.settle()  # and no busy loop, although somebody calls
        guest.say(Op.RST, port=0)
        guest.machine.settle()
        client.sendall(b"CONNECT 9\n")
        guest.machine.settle()
        assert guest.ops() == [Op.REQUEST]
    for link in links:
        link.close()


def test_vsock_reset_hangs_up_and_a_new_driver_starts_afresh(
    guest: Guest, server: socket.socket
) -> None:
    with accepted(guest, server) as link, dial(guest.path) as caller:
        guest.machine.settle()
        guest.machine.driver.status = 0
        assert closed(link) and closed(caller)
        assert guest.machine.loop.wanted == {}
    guest.up()
    with dial(guest.path) as client:
        guest.called_by(client)


@pytest.mark.parametrize("queue", [RX, TX])
def test_vsock_driver_with_one_queue_only_serves_nobody_and_costs_nothing(
    guest: Guest, server: socket.socket, queue: int
) -> None:
    driver = guest.machine.driver
    driver.negotiate(driver.offered_features())
    rings = VirtioQueueDriver(guest.machine.memory, 0x1000, 16)
    guest.machine.queues[queue] = rings
    driver.set_queue(queue, rings.desc, rings.avail, rings.used, 16)
    driver.start()
    with dial(guest.path) as client:
        client.sendall(b"CONNECT 1\n")
        guest.machine.settle()
        if queue == TX:
            guest.say(Op.REQUEST)
            guest.say(Op.RST)
        guest.machine.settle()
        assert guest.machine.loop.wanted == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "path= is missing; write --vsock path=PATH"),
        ("cid=3", "path= is missing"),
        ("path=", "'path' has no value"),
        ("path={dir}/v,cid=2", "cid=2 is not in the range 3 to 4294967294"),
        ("path={dir}/v,cid=4294967295", "is not in the range"),
        ("path={dir}/v,cid=three", "cid=three is no number"),
        ("path={dir}/v,cid=3,cid=4", "'cid' is given twice"),
        ("path={dir}/v,port=4", "unknown option 'port'"),
        ("path={dir}/no/v", "--vsock path={dir}/no/v: cannot listen there: No such file"),
        ("path={dir}", "cannot listen there: Address already in use"),
    ],
)
def test_vsock_bad_input_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message.replace("{dir}", str(tmp_path)))):
        open_vsock(text.replace("{dir}", str(tmp_path)))

    assert os.listdir(tmp_path) == []


# --- what the guest can make the device hold, and do ---


def containers(device: vsock.VirtioVsock) -> dict[str, int]:
    return {name: len(held) for name, held in vars(device).items() if hasattr(held, "__len__")}


def test_vsock_connections_that_are_over_leave_nothing_behind(
    guest: Guest, server: socket.socket
) -> None:
    """Their keys stayed: a guest that calls and hangs up made the monitor grow."""
    device = guest.machine.device
    assert isinstance(device, vsock.VirtioVsock)
    before = containers(device)

    for port in range(2000, 2100):
        guest.say(Op.REQUEST, port=port)
        guest.say(Op.RST, port=port)
        server.accept()[0].close()

    guest.heard()
    assert containers(device) == before


@pytest.mark.parametrize("op", [Op.RW, Op.SHUTDOWN, Op.RST, 99])
def test_vsock_packet_that_ends_its_connection_leaves_nothing_behind(
    guest: Guest, server: socket.socket, op: int
) -> None:
    device = guest.machine.device
    assert isinstance(device, vsock.VirtioVsock)
    before = containers(device)
    link = accepted(guest, server)
    link.close()

    guest.say(op, b"x", flags=SHUTDOWN_SEND | SHUTDOWN_RECEIVE)
    guest.say(Op.RST)

    guest.heard()
    assert containers(device) == before


def test_vsock_programs_that_hang_up_leave_nothing_behind(guest: Guest) -> None:
    device = guest.machine.device
    assert isinstance(device, vsock.VirtioVsock)
    before = containers(device)

    for said in (b"CONNECT 1\n", b"CON", b"x" * 50, b""):
        client = dial(guest.path)
        client.sendall(said)
        client.close()
        guest.machine.settle()
        guest.say(Op.RST, host_port=device._next_port, port=1)

    guest.heard()
    assert containers(device) == before


def test_vsock_buffers_of_a_header_alone_leave_the_device_at_rest(
    tmp_path: Path, server: socket.socket
) -> None:
    """The host's data, for which there is no room, kept a processor busy."""
    guest = Guest(tmp_path / "v", rx_size=HEADER_SIZE)
    guest.up()
    link = accepted(guest, server)
    link.send(b"data")

    guest.machine.settle()  # fails where the device never comes to rest

    assert guest.ops() == []
    guest.say(Op.CREDIT_REQUEST)
    assert guest.ops() == [Op.CREDIT_UPDATE]  # what has no data goes through
    link.close()
    guest.machine.close()


def test_vsock_data_comes_once_there_is_a_buffer_with_room(
    tmp_path: Path, server: socket.socket
) -> None:
    guest = Guest(tmp_path / "v", rx_size=HEADER_SIZE)
    guest.up()
    link = accepted(guest, server)
    link.send(b"data")
    guest.machine.settle()
    for _ in range(8):  # the small ones are used up
        guest.say(Op.CREDIT_REQUEST)
    machine = guest.machine
    used = machine.queues[RX].collect()
    buffer = machine.blank(100)
    machine.give(RX, buffer)

    machine.kick(RX)

    assert len(used) == 8
    ((_, size),) = machine.queues[RX].collect()
    assert machine.text(buffer, size)[HEADER_SIZE:] == b"data"
    link.close()
    machine.close()


def test_vsock_turn_ends_with_its_budget_and_goes_on(guest: Guest, server: socket.socket) -> None:
    link = accepted(guest, server)
    queue = guest.machine.device._queues[TX]
    queue.budget = Budget(lambda: 0.0)
    out = guest.machine.place(
        Header(CID, 2, PORT, HOST_PORT, 0, TYPE_STREAM, Op.CREDIT_UPDATE, 0, CREDIT, 0).pack()
    )
    for _ in range(10):
        guest.machine.give(TX, out)
    queue.budget.spend(TURN_CALLS - 12)

    guest.machine.device.process(TX)

    assert 0 < len(guest.machine.queues[TX].collect()) < 10
    assert queue.more
    guest.machine.kick(TX)
    guest.machine.queues[TX].collect()
    assert guest.machine.queues[TX].seen == guest.machine.queues[TX].available
    link.close()
