"""A disk over a protected guest's memory: device files unchanged, and no byte of a private page.

Every access by the memory's own fd is EBADF here, a load from a private page would be SIGSEGV.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from kvm_bindings import fdops
from tests.support.disk_machine import BAR, DiskMachine, every_kind_of_request_works
from tests.support.fake_memory import FakeMemory
from tests.support.memory import page, pages, pattern
from tests.support.protected import ProtectedGuest, protected_memory
from tests.support.virtio_driver import NEEDS_RESET, Piece, VirtioPciDriver
from vmm.core.ranges import PAGE_SIZE
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.virtio.block import (
    T_IN,
    T_OUT,
    VirtioBlock,
)
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.pci_transport import VirtioPciTransport
from vmm.memory.engines import make_engine

PRIVATE = pages(48, 16)


@pytest.fixture(params=["auto", "pread"])
def machine(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[DiskMachine, ProtectedGuest]]:
    """A disk of 1 MiB; the guest keeps its last 16 pages."""
    path = tmp_path / "disk"
    path.write_bytes(pattern(1 << 20))
    with protected_memory(PRIVATE) as (memory, guest):
        disk = open_disk(f"{path},serial=R1")
        ports = PortBus()
        pci = PciBus(ports)
        block = VirtioBlock(disk, fdops.punch_hole)
        seen = memory.through(make_engine(request.param, memory.shared))
        transport = VirtioPciTransport(block, seen, lambda: None, bar_base=BAR, interrupt_line=5)
        pci.add(0, host_bridge())
        pci.add(1, transport.function)
        driver = VirtioPciDriver(pci, ports, cast(FakeMemory, guest), 1)
        yield (
            DiskMachine(cast(FakeMemory, guest), ports, pci, block, transport, driver, path),
            guest,
        )
        disk.close()


@pytest.mark.parametrize("size", [PAGE_SIZE, 16 * PAGE_SIZE])
def test_disk_requests_of_every_kind_work_by_copying_calls(
    machine: tuple[DiskMachine, ProtectedGuest], size: int
) -> None:
    disk, _ = machine

    every_kind_of_request_works(disk, size)


@pytest.mark.parametrize("request_type", [T_IN, T_OUT])
def test_request_that_names_a_private_page_stops_the_disk_and_leaves_the_page(
    machine: tuple[DiskMachine, ProtectedGuest], request_type: int
) -> None:
    disk, guest = machine
    queue = disk.up()
    guest.poke(b"secret" * 100, page(50))
    piece = Piece(page(50), PAGE_SIZE, request_type == T_IN)

    pieces, _ = disk.request(request_type, 0, piece)
    queue.offer(queue.chain(pieces))
    disk.driver.notify()

    assert queue.collect() == []
    assert disk.driver.status & NEEDS_RESET
    assert guest.peek(600, page(50)) == b"secret" * 100
    assert b"secret" not in disk.disk_bytes()
