"""virtio-net from the guest's side, on a backend that the test holds the other end of."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.support.fake_memory import BatchingFakeMemory, FakeMemory
from tests.support.virtio_driver import ACCESS_PLATFORM, NEEDS_RESET, VERSION_1, Piece
from tests.support.virtio_machine import MEMORY, VirtioMachine
from vmm.core.ranges import Range
from vmm.devices.virtio.budget import TURN_CALLS, Budget
from vmm.devices.virtio.net import (
    F_CSUM,
    F_GUEST_CSUM,
    F_HOST_TSO4,
    F_HOST_TSO6,
    F_MRG_RXBUF,
    HEADER_SIZE,
    LARGEST_FRAME,
    RX,
    TX,
    VirtioNet,
)
from vmm.devices.virtio.net_backend import Passt
from vmm.devices.virtio.queue import F_INDIRECT_DESC

MAC = bytes.fromhex("020000000001")
HEADER = bytes(HEADER_SIZE)
PLAIN = HEADER[:10] + b"\1\0"  # num_buffers: 1


class Network:
    """A machine with a card, and the passt at the other end of its socket."""

    def __init__(self, memory: FakeMemory | None = None) -> None:
        ours, self.passt = socket.socketpair()
        self.passt.setblocking(False)
        self.device = VirtioNet(Passt(ours), MAC)
        self.machine = VirtioMachine(self.device, memory)

    def close(self) -> None:
        self.machine.close()
        self.passt.close()

    def arrive(self, *frames: bytes) -> None:
        for frame in frames:
            self.passt.sendall(struct.pack(">I", len(frame)) + frame)
        self.machine.settle()

    def sent(self) -> list[bytes]:
        """The frames that have left the machine."""
        data = b""
        while True:
            try:
                data += self.passt.recv(1 << 20)
            except BlockingIOError:
                break
            self.machine.settle()
        frames = []
        while data:
            (size,) = struct.unpack_from(">I", data)
            frames.append(data[4 : 4 + size])
            data = data[4 + size :]
        return frames


@pytest.fixture(params=[FakeMemory, BatchingFakeMemory])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """On memory with verbs for many pieces, and on one that is read piece by piece."""
    made = Network(request.param(MEMORY))
    yield made
    made.close()


def test_net_config_names_the_address_and_a_link(network: Network) -> None:
    driver = network.machine.driver
    network.machine.up()

    config = b"".join(
        network.machine.ports.read(driver.device_config + i, 1).to_bytes(1, "little")
        for i in range(10)
    )

    assert config == MAC + struct.pack("<HH", 1, 1)


def test_net_frames_leave_in_order_whatever_their_pieces(network: Network) -> None:
    machine = network.machine
    machine.up()
    whole = machine.give(TX, machine.place(HEADER + b"first frame"))
    cut = machine.give(
        TX,
        machine.place(HEADER[:5]),
        machine.place(HEADER[5:] + b"second"),
        machine.place(b" frame"),
    )

    machine.kick(TX)

    assert network.sent() == [b"first frame", b"second frame"]
    assert machine.queues[TX].collect() == [(whole, 0), (cut, 0)]
    assert machine.device.statistics.bytes_written == 23


def test_net_frames_arrive_in_the_buffers_that_are_there(network: Network) -> None:
    machine = network.machine
    machine.up(refuse=F_MRG_RXBUF)
    buffers = [machine.blank(1526) for _ in range(2)]
    heads = [machine.give(RX, buffer) for buffer in buffers]
    machine.kick(RX)

    network.arrive(b"one", b"two", b"three")

    assert machine.queues[RX].collect() == [(heads[0], 15), (heads[1], 15)]
    assert machine.text(buffers[0], 15) == PLAIN + b"one"
    # The third waits on the host, and costs nothing until there is a buffer.
    assert machine.loop.wanted == {}
    third = machine.blank(1526)
    machine.give(RX, third)
    machine.kick(RX)
    assert machine.text(third, 17) == PLAIN + b"three"


def test_net_frame_is_spread_over_buffers_if_that_was_agreed(network: Network) -> None:
    machine = network.machine
    machine.up()
    buffers = [machine.blank(100) for _ in range(4)]
    heads = [machine.give(RX, buffer) for buffer in buffers]
    machine.kick(RX)
    frame = bytes(range(200)) + b"end"

    network.arrive(frame)

    assert machine.queues[RX].collect() == [(heads[0], 100), (heads[1], 100), (heads[2], 15)]
    written = machine.text(buffers[0], 100) + machine.text(buffers[1], 100)
    assert written + machine.text(buffers[2], 15) == HEADER[:10] + b"\3\0" + frame


def test_net_frame_waits_for_as_many_buffers_as_it_takes(network: Network) -> None:
    machine = network.machine
    machine.up()
    buffers = [machine.blank(100) for _ in range(3)]
    machine.give(RX, buffers[0])
    machine.kick(RX)
    network.arrive(bytes(200), b"next")
    assert machine.queues[RX].collect() == []
    assert machine.loop.wanted == {}

    machine.give(RX, buffers[1])
    machine.give(RX, buffers[2])
    machine.kick(RX)

    assert [size for _, size in machine.queues[RX].collect()] == [100, 100, 12]
    last = machine.blank(100)
    machine.give(RX, last)
    machine.kick(RX)
    assert machine.text(last, 16) == PLAIN + b"next"
    assert machine.device.statistics.errors == 0


def test_net_frame_that_all_buffers_of_a_full_ring_do_not_hold_is_dropped(
    network: Network,
) -> None:
    machine = network.machine
    machine.up(size=2)
    buffers = [machine.blank(100) for _ in range(2)]
    for buffer in buffers:
        machine.give(RX, buffer)
    machine.kick(RX)

    network.arrive(bytes(300), b"small")

    assert machine.text(buffers[0], 17) == PLAIN + b"small"
    assert machine.device.statistics.errors == 1


def test_net_frame_that_a_single_buffer_does_not_hold_is_dropped(network: Network) -> None:
    machine = network.machine
    machine.up(refuse=F_MRG_RXBUF)
    buffer = machine.blank(100)
    head = machine.give(RX, buffer)
    machine.kick(RX)

    network.arrive(bytes(200), b"small")

    assert machine.queues[RX].collect() == [(head, 17)]
    assert machine.text(buffer, 17) == PLAIN + b"small"
    assert machine.device.statistics.errors == 1


def test_net_guest_that_sends_more_than_passt_takes_waits(network: Network) -> None:
    machine = network.machine
    machine.up(size=64)
    frame = machine.place(HEADER + bytes(range(250)) * 256)
    for _ in range(60):
        machine.give(TX, frame)

    machine.kick(TX)

    done = len(machine.queues[TX].collect())
    assert 0 < done < 60
    assert [w[1:] for w in machine.loop.wanted.values()][-1] == (True, True)
    frames = network.sent()
    assert frames == [bytes(range(250)) * 256] * 60
    assert done + len(machine.queues[TX].collect()) == 60


def test_net_driver_that_adds_frames_all_the_time_has_to_notify_of_them(
    network: Network,
) -> None:
    machine = network.machine
    machine.up(size=16)
    frame = machine.place(HEADER + b"x")
    offered = 0

    def offer(verb: str, gpa: int) -> None:
        nonlocal offered
        if verb == "pread" and gpa == frame.gpa:  # one is being sent: here is the next one
            offered += 1
            machine.give(TX, frame)

    machine.memory.before = offer
    machine.give(TX, frame)

    machine.transport.notify(TX)

    assert offered == 1
    assert machine.queues[TX].collect() == [(0, 0)]
    assert machine.queues[TX].notify_event() == 1  # so that it notifies of the second


@pytest.mark.parametrize("pieces", [[b""], [HEADER[:11]]])
def test_net_frame_without_a_whole_header_stops_the_device(
    network: Network, pieces: list[bytes]
) -> None:
    machine = network.machine
    machine.up()
    machine.give(TX, *[machine.place(piece) for piece in pieces])

    machine.kick(TX)

    assert machine.driver.status & NEEDS_RESET
    assert machine.loop.wanted == {}  # nothing is left that could keep a processor busy


def test_net_frame_too_large_for_any_network_is_not_even_read(network: Network) -> None:
    machine = network.machine
    machine.up()
    machine.give(TX, Piece(0, 0x10000), Piece(0, LARGEST_FRAME))
    machine.memory.calls.clear()

    machine.kick(TX)

    assert len(machine.queues[TX].collect()) == 1
    assert network.sent() == []
    assert machine.device.statistics.errors == 1


@pytest.mark.parametrize("queue", [RX, TX])
def test_net_private_buffer_stops_the_device_and_is_counted(network: Network, queue: int) -> None:
    machine = network.machine
    machine.up()
    machine.memory.private.append(Range(0x80000, 4096))
    machine.give(queue, Piece(0x80000, 100, queue == RX))
    machine.kick(queue)

    network.arrive(b"frame")

    assert machine.driver.status & NEEDS_RESET
    assert machine.device.statistics.refused == 1
    assert network.sent() == []
    assert machine.loop.wanted == {}


def test_net_receive_buffer_without_room_for_a_header_stops_the_device(network: Network) -> None:
    machine = network.machine
    machine.up()
    machine.give(RX, machine.blank(11))
    machine.kick(RX)

    network.arrive(b"frame")

    assert machine.driver.status & NEEDS_RESET


def test_net_reset_lets_go_of_buffers_and_a_new_driver_goes_on(network: Network) -> None:
    machine = network.machine
    machine.up()
    old = machine.blank(100)
    machine.give(RX, old)
    machine.kick(RX)

    machine.driver.status = 0
    network.arrive(b"late")

    assert machine.text(old, 4) == b"\xcc" * 4
    machine.up()
    new = machine.blank(100)
    machine.give(RX, new)
    machine.kick(RX)
    assert machine.text(new, 16) == PLAIN + b"late"


@pytest.mark.parametrize("last", [b"", struct.pack(">I", LARGEST_FRAME + 1) + b"x"])
def test_net_passt_that_is_gone_or_mad_is_a_pulled_cable(network: Network, last: bytes) -> None:
    machine = network.machine
    machine.up()
    machine.give(RX, machine.blank(2000))
    machine.kick(RX)
    generation = machine.driver.get(0x15, 1)

    network.passt.sendall(last)
    if not last:
        network.passt.shutdown(socket.SHUT_WR)
    machine.settle()

    assert machine.ports.read(machine.driver.device_config + 6, 2) == 0
    assert machine.driver.get(0x15, 1) != generation
    assert machine.driver.isr() & 2
    head = machine.give(TX, machine.place(HEADER + b"lost"))
    machine.kick(TX)
    assert machine.queues[TX].collect() == [(head, 0)]
    assert machine.loop.wanted == {}


def test_net_only_the_transmit_queue_never_waits_for_frames(network: Network) -> None:
    """A driver may enable what it likes: nobody serves frames that come in then."""
    machine = network.machine
    driver = machine.driver
    driver.enable()
    assert driver.negotiate(driver.offered_features())
    driver.set_queue(TX, 0x1000, 0x2000, 0x3000, 16)
    driver.start()

    network.arrive(b"frame")

    assert machine.loop.wanted == {}


def test_net_many_frames_cost_few_reads_of_the_rings(network: Network) -> None:
    machine = network.machine
    machine.up(size=64)
    frame = machine.place(HEADER + b"x" * 100)
    for _ in range(64):
        machine.give(TX, frame)
    machine.memory.calls.clear()

    machine.kick(TX)

    assert len(network.sent()) == 64
    # Per batch of 32: index, entries, table; then the frames, and once for the event indexes.
    assert machine.memory.calls["pread"] <= 64 + 3 * 3 + 4


def test_net_backend_that_cannot_do_the_offloads_stops_the_device(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest's write to the status register must not raise in its vCPU's thread."""

    def refuse(backend: Passt, features: int) -> None:
        raise OSError(errno.EINVAL, "TUNSETOFFLOAD")

    monkeypatch.setattr(Passt, "set_offloads", refuse)

    network.machine.up()

    assert network.machine.driver.status & NEEDS_RESET
    assert network.machine.loop.wanted == {}


# --- what must not reach the backend, or is to reach the guest ---


class NotingBackend:
    """Can do all offloads; keeps the frames that it gets."""

    is_stream = False
    features = F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_HOST_TSO6

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.sent: list[bytes] = []

    def set_offloads(self, features: int) -> None:
        """Nothing comes back from here."""

    def receive(self) -> bytes | None:
        return None

    def send(self, frame: bytes) -> bool:
        self.sent.append(frame)
        return True

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        os.close(self.fd)


CSUM_V4 = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)
CSUM_ONLY = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0)


@pytest.mark.parametrize(
    ("agreed", "given", "passed_on"),
    [
        (0, b"\xff\x83" + b"\xff" * 10, HEADER),  # no offload was agreed on
        (0, CSUM_V4, HEADER),
        (F_CSUM, CSUM_V4, CSUM_ONLY),  # segmentation was not
        (F_CSUM | F_HOST_TSO6, CSUM_V4, CSUM_ONLY),
        (F_CSUM | F_HOST_TSO4, CSUM_V4, CSUM_V4),
        (F_CSUM | F_HOST_TSO4, b"\7" + CSUM_V4[1:10] + b"\xff\xff", CSUM_V4),  # device's bits
        (F_CSUM | F_HOST_TSO4, b"\0" + CSUM_V4[1:], HEADER),  # segments without a checksum
        (F_CSUM | F_HOST_TSO4, CSUM_V4[:1] + b"\x81" + CSUM_V4[2:], CSUM_ONLY),  # ECN
        (F_CSUM | F_HOST_TSO4, CSUM_V4[:1] + b"\3" + CSUM_V4[2:], CSUM_ONLY),  # UFO
    ],
)
def test_net_header_reaches_the_backend_as_far_as_it_was_agreed_on(
    agreed: int, given: bytes, passed_on: bytes
) -> None:
    backend = NotingBackend()
    machine = VirtioMachine(VirtioNet(backend, MAC))
    machine.up(features=VERSION_1 | ACCESS_PLATFORM | agreed)
    machine.give(TX, machine.place(given + b"x" * 64))

    machine.kick(TX)

    assert backend.sent == [passed_on + b"x" * 64]
    machine.close()


def test_net_empty_frame_is_dropped_and_returned(network: Network) -> None:
    network.machine.up()
    head = network.machine.give(TX, network.machine.place(HEADER))

    network.machine.kick(TX)

    assert network.machine.queues[TX].collect() == [(head, 0)]
    assert network.sent() == []
    assert network.device.statistics.errors == 1


def link_status(machine: VirtioMachine) -> int:
    return machine.ports.read(machine.driver.device_config + 6, 2)


def test_net_peer_lost_while_frames_wait_is_announced(network: Network) -> None:
    """The guest saw a cable that was still there, and a generation that had not changed."""
    machine = network.machine
    machine.up()
    big = machine.place(HEADER + b"x" * 60000)
    for _ in range(12):
        machine.give(TX, big)
    machine.kick(TX)
    assert len(machine.queues[TX].collect()) < 12
    before = machine.driver.get(0x15, 1)
    machine.driver.isr()
    network.passt.close()

    machine.kick(TX)

    assert link_status(machine) == 0
    assert machine.driver.get(0x15, 1) != before
    assert machine.driver.isr() & 2
    assert len(machine.queues[TX].collect()) + machine.queues[TX].seen >= 12
    assert machine.loop.wanted == {}


def test_net_peer_lost_while_a_frame_is_sent_is_announced(network: Network) -> None:
    machine = network.machine
    machine.up()
    network.passt.close()
    before = machine.driver.get(0x15, 1)
    machine.give(TX, machine.place(HEADER + b"x" * 100))

    machine.driver.notify(TX)
    machine.rung.clear()
    machine.transport.notify(TX)

    assert link_status(machine) == 0
    assert machine.driver.get(0x15, 1) != before


@pytest.mark.parametrize("call", ["recv", "send"])
def test_net_host_without_memory_does_not_keep_the_loop_busy(
    network: Network, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket stays ready all the time, and trying at once would not help."""
    machine = network.machine
    machine.up()
    buffer = machine.blank(100)
    machine.give(RX, buffer)
    machine.kick(RX)

    def no_memory(*_: object) -> object:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    network.passt.sendall(struct.pack(">I", 5) + b"frame")
    monkeypatch.setattr(socket.socket, call, no_memory)
    machine.give(TX, machine.place(HEADER + b"from the guest"))
    if call == "send":
        machine.settle()
        machine.kick(TX)  # the first frame is kept, and the socket waited for
    machine.loop.run_ready()

    assert not machine.loop.run_ready()
    monkeypatch.undo()
    machine.loop.pass_time()
    machine.settle()
    if call == "recv":
        assert machine.text(buffer, 17) == PLAIN + b"frame"
    else:
        assert network.sent() == [b"from the guest"]


def test_net_turn_of_frames_in_crumbs_is_bounded(network: Network) -> None:
    """64 KiB over descriptors of one byte: dropped, because no turn would be long enough."""
    machine = network.machine
    machine.up(size=256)
    queue = machine.queues[RX]
    table = machine.place(
        b"".join(
            struct.pack(
                "<QIHH", 0x80000 + i, 12 if i == 0 else 1, 2 | (1 if i < 1023 else 0), i + 1
            )
            for i in range(1024)
        )
    )
    for i in range(256):
        queue.descriptor(i, table.gpa, table.size, 4, 0)
    queue.offer(*range(256))
    machine.kick(RX)
    machine.memory.calls.clear()

    network.arrive(b"x" * 60000, b"y" * 100)

    assert machine.memory.calls["pwrite"] < 2 * TURN_CALLS
    assert network.device.statistics.errors == 1
    assert network.device.statistics.requests == 1
    ((_, size),) = queue.collect()
    assert size == HEADER_SIZE + 100


def test_net_turn_sends_what_its_budget_has_calls_for(network: Network) -> None:
    machine = network.machine
    machine.up(size=256)
    pieces = [Piece(0x80000 + 2 * i, 1) for i in range(80)]
    queue = machine.queues[TX]
    for _ in range(3):
        machine.give(TX, *pieces)
    network.device._queues[TX].budget = Budget(lambda: 0.0)
    network.device._queues[TX].budget.spend(TURN_CALLS - 100)

    network.device.process(TX)

    assert queue.used_index() == 2
    assert network.device._queues[TX].more


def test_net_turn_of_frames_without_room_is_bounded(network: Network) -> None:
    """A frame that is dropped costs something, too: a busy network would never end the turn."""
    machine = network.machine
    machine.up(features=VERSION_1 | ACCESS_PLATFORM, size=16)  # one buffer a frame
    machine.give(RX, machine.blank(64))
    machine.transport.notify(RX)
    received = 0

    def receive() -> bytes:
        nonlocal received
        received += 1
        assert received < 10 * TURN_CALLS, "the turn goes on as long as there are frames"
        return HEADER + b"x" * 1500

    network.device._backend.receive = receive  # type: ignore[method-assign]

    machine.transport.notify(RX)

    assert 0 < received <= TURN_CALLS
    assert machine.rung == [RX]


# --- what is read and written together ---


@pytest.fixture
def batching() -> Iterator[Network]:
    made = Network(BatchingFakeMemory(MEMORY))
    yield made
    made.close()


def test_net_frames_that_leave_together_are_read_by_one_call(batching: Network) -> None:
    machine = batching.machine
    machine.up()
    for number in range(5):
        machine.give(TX, machine.place(HEADER), machine.place(b"frame %d" % number))
    machine.memory.calls.clear()

    machine.kick(TX)

    assert batching.sent() == [b"frame %d" % number for number in range(5)]
    assert machine.memory.calls["read_many"] == 2  # the rings, then the frames
    assert batching.device.statistics.bytes_written == 5 * len(b"frame 0")


def test_net_frames_that_are_too_much_for_one_call_leave_in_order(batching: Network) -> None:
    machine = batching.machine
    machine.up()
    frames = [bytes([number]) * 30000 for number in range(5)]
    for frame in frames:
        machine.give(TX, machine.place(HEADER), machine.place(frame))
    machine.memory.calls.clear()

    machine.kick(TX)

    assert batching.sent() == frames
    assert machine.memory.calls["read_many"] == 1 + 3


def test_net_what_is_no_frame_is_left_out_of_those_that_leave_together(batching: Network) -> None:
    machine = batching.machine
    machine.up()
    heads = [
        machine.give(TX, machine.place(HEADER + b"first")),
        machine.give(TX, machine.place(HEADER)),
        machine.give(TX, Piece(0, 0x10000), Piece(0, LARGEST_FRAME)),
        machine.give(TX, machine.place(HEADER), machine.place(b"last")),
    ]

    machine.kick(TX)

    assert batching.sent() == [b"first", b"last"]
    assert machine.queues[TX].collect() == [(head, 0) for head in heads]
    assert batching.device.statistics.errors == 2


def test_net_frames_before_one_that_is_private_leave(network: Network) -> None:
    machine = network.machine
    machine.up()
    machine.memory.private.append(Range(0x80000, 4096))
    first = machine.give(TX, machine.place(HEADER + b"first"))
    machine.give(TX, machine.place(HEADER), Piece(0x80000, 100))
    machine.give(TX, machine.place(HEADER + b"last"))

    machine.kick(TX)

    assert network.sent() == [b"first"]
    assert machine.queues[TX].collect() == [(first, 0)]
    assert machine.driver.status & NEEDS_RESET
    assert network.device.statistics.refused == 1


def test_net_frames_that_arrive_together_are_written_and_returned_by_one_call(
    batching: Network,
) -> None:
    machine = batching.machine
    machine.up()
    buffers = [machine.blank(100) for _ in range(8)]
    for buffer in buffers:
        machine.give(RX, buffer)
    machine.kick(RX)
    machine.memory.calls.clear()

    batching.arrive(b"one", b"two" * 40, b"three")

    assert [size for _, size in machine.queues[RX].collect()] == [15, 100, 32, 17]
    assert machine.text(buffers[3], 17) == PLAIN + b"three"
    assert (machine.memory.calls["write_many"], machine.memory.calls["pwrite"]) == (1, 0)
    assert batching.device.statistics.requests == 3
    assert batching.device.statistics.bytes_read == 3 + 120 + 5


def test_net_frames_that_are_too_much_for_one_call_arrive_in_order() -> None:
    frames = [bytes([number]) * 30000 for number in range(5)]
    waiting = [HEADER + frame for frame in frames]
    backend = NotingBackend()
    backend.receive = lambda: waiting.pop(0) if waiting else None  # type: ignore[method-assign]
    machine = VirtioMachine(VirtioNet(backend, MAC), BatchingFakeMemory(MEMORY))
    machine.up()
    buffers = [machine.blank(30100) for _ in frames]
    for buffer in buffers:
        machine.give(RX, buffer)
    machine.memory.calls.clear()

    machine.kick(RX)

    assert [machine.text(buffer, 30012) for buffer in buffers] == [PLAIN + one for one in frames]
    assert machine.memory.calls["write_many"] == 3
    machine.close()


def test_net_frames_before_one_whose_buffer_is_private_arrive(network: Network) -> None:
    """And are counted; of the others the driver is told nothing."""
    machine = network.machine
    machine.up()
    machine.memory.private.append(Range(0x80000, 4096))
    first = machine.blank(100)
    head = machine.give(RX, first)
    machine.give(RX, Piece(0x80000, 100, True))
    last = machine.blank(100)
    machine.give(RX, last)
    machine.kick(RX)

    network.arrive(b"one", b"two", b"three")

    assert machine.text(first, 15) == PLAIN + b"one"
    assert machine.text(last, 1) == b"\xcc"
    assert machine.queues[RX].collect() == [(head, 15)]
    assert machine.driver.status & NEEDS_RESET
    statistics = network.device.statistics
    assert (statistics.requests, statistics.bytes_read, statistics.refused) == (1, 3, 1)


def test_net_without_a_process_has_indirect_tables_and_no_patience(network: Network) -> None:
    assert network.machine.driver.offered_features() & F_INDIRECT_DESC
    network.machine.up()
    assert network.device._queues[TX].patience == 0
