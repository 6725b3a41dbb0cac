"""A guest whose other vCPU moves the available index on while the device looks at the queue."""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_memory import BatchingFakeMemory, FakeMemory
from tests.support.second_vcpu import SecondVcpu
from tests.support.virtio_driver import NEEDS_RESET, Piece
from tests.support.virtio_machine import VirtioMachine
from tests.unit.devices.test_virtio_net import Network
from vmm.control.signals import SignalReactions
from vmm.core.event_loop import EventLoop
from vmm.core.ranges import Range
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.net import RX

TX0 = 1


@pytest.fixture
def console(tmp_path: Path) -> Iterator[VirtioMachine]:
    machine = VirtioMachine(open_console([f"file={tmp_path / 'out'}"]), FakeMemory())
    yield machine
    machine.close()


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    yield made
    made.close()


def test_console_output_while_the_index_moves_stays_within_the_used_ring(
    console: VirtioMachine,
) -> None:
    console.up(size=4)
    queue = console.queues[TX0]
    queue.descriptor(0, 0x80000, 0, 0, 0)
    behind = queue.used + 4 + 8 * 4 + 2
    console.memory.poke(b"\xaa" * 0x4000, behind)
    SecondVcpu(console.memory, queue, start=1)

    console.transport.notify(TX0)

    assert console.memory.peek(0x4000, behind) == b"\xaa" * 0x4000
    assert queue.used_index() <= 4
    assert console.driver.status & NEEDS_RESET


def test_console_output_while_the_index_moves_ends_after_a_ring_of_buffers(
    console: VirtioMachine,
) -> None:
    """The first version went on for 262,144 buffers of no bytes."""
    console.up(size=64)
    queue = console.queues[TX0]
    queue.descriptor(0, 0x40000, 0, 0, 0)
    vcpu = SecondVcpu(console.memory, queue, start=1)

    console.transport.notify(TX0)

    assert vcpu.looks <= 64 + 2


def hungry(network: Network, size: int = 256) -> SecondVcpu:
    """Receive buffers without room, one header apart, and an index that never stands still."""
    machine = network.machine
    machine.up(size=size)
    queue = machine.queues[RX]
    for i in range(size):
        queue.descriptor(i, 0x40000, 12 if i == 0 else 0, 2, 0)
        machine.memory.poke(struct.pack("<H", i), queue.avail + 4 + 2 * i)
    queue.set_available_index(size)
    machine.transport.notify(RX)  # no frame yet: all is put back

    def nothing_but_empty_buffers(looks: int) -> None:
        if looks == 8:  # the ring has been seen once
            machine.memory.poke(struct.pack("<256H", *[1] * 256), queue.avail + 4)

    return SecondVcpu(machine.memory, queue, start=size, step=32, also=nothing_but_empty_buffers)


def test_net_frame_that_waits_for_room_while_the_index_moves_ends_the_turn(
    network: Network,
) -> None:
    vcpu = hungry(network)

    network.arrive(b"x" * 1500)

    assert vcpu.looks < 20
    assert network.machine.driver.status & NEEDS_RESET


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_while_the_index_moves_ends_the_run(network: Network, number: int) -> None:
    """With the real loop and the real reactions: what a turn does must not keep signals out."""
    loop = EventLoop()
    reasons: list[str] = []

    def end(reason: str) -> None:
        reasons.append(reason)
        loop.stop()

    reactions = SignalReactions(
        loop,
        end=end,
        press_power_button=lambda: False,
        suspend=lambda: None,
        continued=lambda: None,
        is_stuck=lambda: False,
    )
    network.device.watch = loop.watch
    served = threading.Event()
    vcpu = hungry(network)

    def send() -> None:
        network.passt.sendall(struct.pack(">I", 1500) + b"x" * 1500)
        assert served.wait(30)
        os.kill(os.getpid(), number)

    look = vcpu.also

    def tell_and_look(looks: int) -> None:
        served.set()
        look(looks)

    vcpu.also = tell_and_look
    sender = threading.Thread(target=send)
    with reactions.installed():
        sender.start()
        loop.run()
    sender.join()
    loop.close()

    assert reasons == [f"received {signal.Signals(number).name}"]


def test_batch_whose_status_byte_is_private_returns_each_chain_once(tmp_path: Path) -> None:
    """The data moved, then a status byte is refused: whose answer got there has it, once."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    machine = VirtioMachine(VirtioBlock(open_disk(str(path))), memory=BatchingFakeMemory())
    machine.up()
    statuses, heads = [], []
    for sector in range(2):
        header = machine.place(struct.pack("<IIQ", 0, 0, sector))
        statuses.append(machine.blank(1))
        heads.append(machine.give(0, header, machine.blank(512), statuses[-1]))
    machine.memory.private.append(Range(statuses[1].gpa, 1))

    machine.kick(0)

    assert machine.queues[0].collect() == [(heads[0], 513)]
    assert machine.text(statuses[0], 1) == b"\0"
    assert machine.driver.status & NEEDS_RESET
    machine.close()


def test_block_available_ring_that_becomes_private_returns_each_chain_once(tmp_path: Path) -> None:
    """The used index has moved when the flags behind it are refused: nothing goes there again."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    machine = VirtioMachine(VirtioBlock(open_disk(str(path))), memory=BatchingFakeMemory())
    machine.up()
    queue = machine.queues[0]
    for sector in range(2):
        header = machine.place(struct.pack("<IIQ", 0, 0, sector))
        machine.give(0, header, machine.blank(512), Piece(machine.room(1), 1, True))

    def take_the_ring(verb: str, gpa: int) -> None:
        if verb == "write_many":
            machine.memory.private.append(Range(queue.avail, 4096 - queue.avail % 4096))

    machine.memory.before = take_the_ring

    machine.kick(0)

    assert queue.used_index() == 2
    assert machine.driver.status & NEEDS_RESET
    machine.close()
