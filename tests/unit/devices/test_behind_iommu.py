"""A disk behind the virtual IOMMU, all of it in private memory: rings, headers, data, statuses."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import cast

import pytest

from tests.support.fake_memory import FakeMemory
from tests.support.iommu import DOMAIN, FIRST, IommuRig
from tests.support.memory import page, pattern
from tests.support.virtio_driver import NEEDS_RESET, Piece
from tests.support.virtio_machine import VirtioMachine
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.virtio.balloon import VirtioBalloon
from vmm.devices.virtio.block import T_IN, T_OUT, VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.devices.virtio.iommu import S_OK
from vmm.memory.engines import make_engine
from vmm.memory.guest_memory import PageState
from vmm.memory.lending import IommuMemory
from vmm.wiring.iommu import memory_behind

RINGS_IOVA = 0x1000  # where the driver in these tests has its rings
DATA_IOVA = 0x100_0000
FIRST_DATA = 32
SECTORS = 64
CONTENT = pattern(512 * SECTORS)


class DiskBehind:
    """Disk, IOMMU and guest. IOVAs of RINGS_IOVA are pages 16 on, those of DATA_IOVA 32 on."""

    def __init__(self, announced: list[tuple[Range, bool, str | None]] | None = None) -> None:
        self.rig = IommuRig()
        self.fd = os.memfd_create("disk")
        os.pwrite(self.fd, CONTENT, 0)
        self.disk = VirtioBlock(DiskFile(self.fd, "disk", SECTORS, False, b""))
        self.stack = ExitStack()
        engine = make_engine("auto", self.rig.shared)
        announce = None
        if announced is not None:

            def announce(area: Range, is_write: bool, named: str | None) -> None:
                announced.append((area, is_write, named))

        memory, self.announce, self.lent_engine = memory_behind(
            *(self.rig.iommu, self.rig.memory, "blk0", FIRST >> 3, self.disk, engine, announce),
            self.stack,
        )
        assert isinstance(memory, IommuMemory)
        self.memory = memory
        self.machine = VirtioMachine(self.disk, memory=cast(FakeMemory, _Guest(self)))

    def up(self) -> None:
        rig = self.rig
        assert rig.attach() == S_OK
        assert rig.map(RINGS_IOVA, 16, 5) == S_OK
        for number in range(16):  # page by page, and out of order in memory
            assert rig.map(DATA_IOVA + page(number), FIRST_DATA + 15 - number) == S_OK
        self.machine.up()

    def request(self, kind: int, sector: int, iova: int, size: int) -> bytes:
        """One request, served; its status byte."""
        header, status = DATA_IOVA, DATA_IOVA + 64
        memory = self.machine.memory
        memory.poke(struct.pack("<IIQ", kind, 0, sector), header)
        memory.poke(b"\xee", status)
        data = Piece(iova, size, kind == T_IN)
        self.machine.give(0, Piece(header, 16), data, Piece(status, 1, True))
        self.machine.kick(0)
        return memory.peek(1, status)

    def close(self) -> None:
        self.machine.close()
        self.stack.close()
        self.rig.close()


class _Guest:
    """What the disk sees, with the guest's own accesses by the same addresses for the driver."""

    def __init__(self, disk: DiskBehind) -> None:
        self.size = 1 << 30
        for name in (
            "pread", "pwrite", "transfer_in", "transfer_out", "discard", "read_many", "write_many",
            "move_in", "move_out",
        ):  # fmt: skip
            setattr(self, name, getattr(disk.memory, name))
        self._private = disk.rig.private

    def _where(self, iova: int) -> int:
        """The guest's page; buffers of these tests don't cross pages on its side."""
        if iova >= DATA_IOVA:
            number, offset = divmod(iova - DATA_IOVA, PAGE_SIZE)
            return page(FIRST_DATA + 15 - number) + offset
        return page(16) + iova - RINGS_IOVA

    def peek(self, size: int, iova: int) -> bytes:
        return b"".join(self._private.pread(n, self._where(at)) for at, n in _cut(iova, size))

    def poke(self, data: bytes, iova: int) -> None:
        for at, n in _cut(iova, len(data)):
            self._private.pwrite(data[at - iova : at - iova + n], self._where(at))

    def close(self) -> None:
        """The rig closes it."""


def _cut(start: int, size: int) -> list[tuple[int, int]]:
    pieces = []
    while size:
        part = min(size, PAGE_SIZE - start % PAGE_SIZE)
        pieces.append((start, part))
        start, size = start + part, size - part
    return pieces


@pytest.fixture
def behind() -> Iterator[DiskBehind]:
    made = DiskBehind()
    yield made
    made.close()


def test_disk_reads_into_private_pages_and_writes_from_them(behind: DiskBehind) -> None:
    behind.up()
    iova = DATA_IOVA + page(3) + 512  # over several pages, from the middle of one

    assert behind.request(T_IN, 8, iova, 3 * PAGE_SIZE) == b"\0"
    assert behind.machine.memory.peek(3 * PAGE_SIZE, iova) == CONTENT[4096 : 4096 * 4]
    behind.machine.memory.poke(pattern(8192, 77), iova)
    assert behind.request(T_OUT, 0, iova, 8192) == b"\0"

    assert os.pread(behind.fd, 8192, 0) == pattern(8192, 77)
    assert behind.rig.shared.resident_bytes() == 0  # nothing went through shared memory
    assert behind.lent_engine is not None
    assert sum(behind.lent_engine.bytes_by.values()) == 3 * PAGE_SIZE + 8192
    # No way of it has the private side's mapping for the kernel's buffer.
    assert behind.lent_engine.bytes_by.keys() == {"splice", "buffer"}
    assert behind.disk.statistics.refused == behind.disk.statistics.errors == 0


def test_disk_whose_buffer_is_not_mapped_needs_a_reset_and_the_driver_is_told(
    behind: DiskBehind,
) -> None:
    behind.up()
    hole = DATA_IOVA + page(16)

    behind.request(T_IN, 0, hole - 512, 1024)

    assert behind.machine.driver.status & NEEDS_RESET
    assert behind.disk.statistics.refused == 1
    reason, flags, endpoint, address = behind.rig.faults()[0]
    assert (reason, flags, endpoint, address) == (2, 0x102, FIRST, hole)


def test_disk_whose_rings_are_unmapped_needs_a_reset(behind: DiskBehind) -> None:
    behind.up()
    assert behind.rig.unmap(RINGS_IOVA, 5) == S_OK

    behind.machine.kick(0)

    assert behind.machine.driver.status & NEEDS_RESET
    assert all(behind.rig.state(number) is PageState.PRIVATE for number in range(16, 21))


def test_disk_works_again_after_the_iommu_was_reset_and_set_up_anew(behind: DiskBehind) -> None:
    behind.up()
    behind.rig.machine.driver.status = 0
    behind.machine.kick(0)
    assert behind.machine.driver.status & NEEDS_RESET

    behind.rig.machine.up()
    behind.machine.driver.status = 0
    behind.up()

    assert behind.request(T_IN, 0, DATA_IOVA + page(1), 512) == b"\0"


def test_policies_hear_of_accesses_by_guest_physical_address() -> None:
    announced: list[tuple[Range, bool, str | None]] = []
    behind = DiskBehind(announced)
    assert behind.rig.attach() == S_OK
    for number in range(2):
        assert behind.rig.map(DATA_IOVA + page(number), FIRST_DATA + 5 - number) == S_OK
    assert behind.announce is not None

    behind.announce(Range(DATA_IOVA + 4000, 200), True, "descriptor")
    behind.announce(Range(DATA_IOVA + page(2), 1), True, None)  # the access itself is refused

    assert announced == [
        (Range(page(FIRST_DATA + 5) + 4000, 96), True, "descriptor"),
        (Range(page(FIRST_DATA + 4), 104), True, "descriptor"),
    ]
    behind.close()


def test_balloon_is_not_behind_the_iommu() -> None:
    rig = IommuRig()
    balloon = VirtioBalloon()

    memory, *_ = memory_behind(
        rig.iommu, rig.memory, "balloon", 2, balloon, None, None, ExitStack()
    )

    assert memory is rig.memory
    assert rig.attach(DOMAIN, 2 << 3) != S_OK
    rig.close()
