"""A machine with one disk, for device tests: buses, memory, the device and a guest's driver."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import (
    ACCESS_PLATFORM,
    VERSION_1,
    Piece,
    VirtioPciDriver,
    VirtioQueueDriver,
)
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus
from vmm.devices.virtio.block import (
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    VirtioBlock,
)
from vmm.devices.virtio.pci_transport import VirtioPciTransport

RINGS, HEADERS, STATUSES, DATA = 0x1000, 0x8000, 0xA000, 0x10000
BAR = 0xC000
MINIMUM = VERSION_1 | ACCESS_PLATFORM


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes that repeat only after a prime number of them."""
    unit = bytes((seed + i * 7) & 0xFF for i in range(4093))
    return (unit * (size // len(unit) + 1))[:size]


@dataclass
class DiskMachine:
    """What a test arranges, acts on and looks at."""

    memory: FakeMemory
    ports: PortBus
    pci: PciBus
    block: VirtioBlock
    transport: VirtioPciTransport
    driver: VirtioPciDriver
    path: Path
    interrupts: list[None] = field(default_factory=list)
    notify_ports: list[int | None] = field(default_factory=list)
    requests: int = 0

    def up(self, features: int | None = None, size: int = 64) -> VirtioQueueDriver:
        """Bring the device up with what it offers (or `features` besides the minimum)."""
        self.driver.enable()
        wanted = self.driver.offered_features() if features is None else MINIMUM | features
        return self.driver.bring_up(wanted, RINGS, size)

    def request(self, kind: int, sector: int, *data: Piece) -> tuple[list[Piece], int]:
        """Header, data and status of a request as pieces, and the status byte's address."""
        slot = self.requests % 256
        self.requests += 1
        header, status = HEADERS + 16 * slot, STATUSES + slot
        self.memory.poke(struct.pack("<IIQ", kind, 0, sector), header)
        self.memory.poke(b"\xee", status)
        return [Piece(header, 16), *data, Piece(status, 1, True)], status

    def do(self, queue: VirtioQueueDriver, kind: int, sector: int, *data: Piece) -> tuple[int, int]:
        """One request from submission to completion: (status, used length)."""
        pieces, status = self.request(kind, sector, *data)
        head = queue.chain(pieces)
        queue.offer(head)
        self.driver.notify()
        ((used, length),) = queue.collect()
        assert used == head
        return self.memory.peek(1, status)[0], length

    def disk_bytes(self) -> bytes:
        return self.path.read_bytes()


MakeMachine = Callable[..., DiskMachine]


def every_kind_of_request_works(machine: DiskMachine, size: int) -> None:
    """Reads and writes of `size` bytes, and one request of each other kind, on a disk of 1 MiB
    whose serial number begins with R1."""
    queue = machine.up()
    before = machine.disk_bytes()
    memory = machine.memory

    read = machine.do(queue, T_IN, 3, Piece(DATA, size, True))
    content = memory.peek(size, DATA)
    written = machine.do(queue, T_OUT, 100, Piece(DATA, size))
    named = machine.do(queue, T_GET_ID, 0, Piece(DATA, 20, True))
    name = memory.peek(2, DATA)
    flushed = machine.do(queue, T_FLUSH, 0)
    memory.poke(struct.pack("<QII", 1000, 2, 0), DATA)
    zeroed = machine.do(queue, T_WRITE_ZEROES, 0, Piece(DATA, 16))
    discarded = machine.do(queue, T_DISCARD, 0, Piece(DATA, 16))

    statuses = [status for status, _ in (read, written, named, flushed, zeroed, discarded)]
    assert statuses == [0] * 6
    assert content == before[3 * 512 : 3 * 512 + size]
    assert name == b"R1"
    after = machine.disk_bytes()
    assert after[100 * 512 : 100 * 512 + size] == content
    assert after[1000 * 512 : 1002 * 512] == bytes(1024)
