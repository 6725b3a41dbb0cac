"""Machines with one disk each, taken apart when the test ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.disk_machine import BAR, DiskMachine, MakeMachine, pattern
from tests.support.fake_memory import BatchingFakeMemory, FakeMemory
from tests.support.virtio_driver import VirtioPciDriver
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.virtio import queue
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.budget import Budget
from vmm.devices.virtio.device import DeviceObserver
from vmm.devices.virtio.pci_transport import VirtioPciTransport
from vmm.devices.virtio.queue import SplitQueue
from vmm.devices.virtio.watched import Announce, WatchedMemory


@pytest.fixture(autouse=True)
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns end by what they do, however slow this machine is; a test about time has a clock."""
    monkeypatch.setattr(queue, "Budget", partial(Budget, lambda: 0.0))


@pytest.fixture
def make_machine(tmp_path: Path) -> Iterator[MakeMachine]:
    """Build a machine: a disk with pattern in its first 2 MiB, its options, how to punch."""
    made: list[tuple[FakeMemory, int]] = []

    def make(
        sectors: int = 64,
        options: str = "",
        punch: Callable[[int, int, int], None] | None = None,
        memory_size: int = 1 << 20,
        ring: Callable[[int], None] | None = None,
        observer: DeviceObserver | None = None,
        announce: Announce | None = None,
        batching: bool = False,
        patience: int = 0,
    ) -> DiskMachine:
        path = tmp_path / f"disk{len(made)}.img"
        path.write_bytes(pattern(512 * min(sectors, 4096)))
        os.truncate(path, 512 * sectors)
        disk = open_disk(str(path) + options)
        memory = (BatchingFakeMemory if batching else FakeMemory)(memory_size)
        made.append((memory, disk.fd))
        ports = PortBus()
        pci = PciBus(ports)
        block = VirtioBlock(disk, punch, patience)
        interrupts: list[None] = []
        notify_ports: list[int | None] = []
        watched = WatchedMemory(memory, announce) if announce else None
        transport = VirtioPciTransport(
            block,
            watched or memory,
            lambda: interrupts.append(None),
            bar_base=BAR,
            interrupt_line=5,
            moved=notify_ports.append,
            ring=ring,
            observer=observer,
            make_queue=watched.queue if watched else SplitQueue,
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
