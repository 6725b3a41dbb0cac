"""A machine with one disk: buses, memory, the device, and a guest's driver for it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import (
    ACCESS_PLATFORM,
    VERSION_1,
    Piece,
    VirtioPciDriver,
    VirtioQueueDriver,
)
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk
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


@pytest.fixture
def make_machine(tmp_path: Path) -> Iterator[MakeMachine]:
    """Build a machine: a disk with pattern in its first 2 MiB, its options, how to punch."""
    made: list[tuple[FakeMemory, int]] = []

    def make(
        sectors: int = 64,
        options: str = "",
        punch: Callable[[int, int, int], None] | None = None,
        memory_size: int = 1 << 20,
    ) -> DiskMachine:
        path = tmp_path / f"disk{len(made)}.img"
        path.write_bytes(pattern(512 * min(sectors, 4096)))
        os.truncate(path, 512 * sectors)
        disk = open_disk(str(path) + options)
        memory = FakeMemory(memory_size)
        made.append((memory, disk.fd))
        ports = PortBus()
        pci = PciBus(ports)
        block = VirtioBlock(disk, punch)
        interrupts: list[None] = []
        notify_ports: list[int | None] = []
        transport = VirtioPciTransport(
            block,
            memory,
            lambda: interrupts.append(None),
            bar_base=BAR,
            interrupt_line=5,
            moved=notify_ports.append,
        )
        pci.add(0, host_bridge())
        pci.add(1, transport.function)
        driver = VirtioPciDriver(pci, ports, memory, 1)
        return DiskMachine(
            memory, ports, pci, block, transport, driver, path, interrupts, notify_ports
        )

    yield make
    for memory, fd in made:
        memory.close()
        os.close(fd)


@pytest.fixture
def machine(make_machine: MakeMachine) -> DiskMachine:
    return make_machine()
