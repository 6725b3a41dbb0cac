"""A guest with a virtual IOMMU: its memory, its driver's requests, and devices behind it."""

from __future__ import annotations

import struct

from tests.support.conversion import RecordingScheme
from tests.support.fake_memory import BatchingFakeMemory
from tests.support.memory import page, pages
from tests.support.virtio_driver import Piece
from tests.support.virtio_machine import VirtioMachine
from vmm.conversion.lending import Lender
from vmm.conversion.transaction import Converter
from vmm.core.ranges import Range
from vmm.devices.virtio import iommu
from vmm.devices.virtio.iommu import VirtioIommu
from vmm.memory.backing import Backing
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import PageState
from vmm.memory.lending import READ, WRITE, Endpoint, IommuMemory, LendingMemory
from vmm.policy import Policy

RAM_PAGES = 64
SHARED_PAGES = 16
"""The first pages are shared, all others private."""
FIRST = 1 << 3
"""The number of the endpoint that is there from the start."""
DOMAIN = 7
BOTH = READ | WRITE
NOTHING = -1
"""The status of a request that the device could not answer."""


class IommuRig:
    """All of it; the IOMMU's own queues are in memory that is nobody else's."""

    def __init__(
        self,
        *policies: Policy,
        timeout: float = 30.0,
        shared: Backing | None = None,
        private: Backing | None = None,
        pages_of_ram: int = RAM_PAGES,
    ) -> None:
        size = page(pages_of_ram)
        self.shared = MemfdBacking(size) if shared is None else shared
        self.private = MemfdBacking(size) if private is None else private
        ram = (Range(0, size),)
        private_pages = pages(SHARED_PAGES, pages_of_ram - SHARED_PAGES)
        self.memory = LendingMemory(ram, self.shared, self.private, (private_pages,))
        self.scheme = RecordingScheme(self.memory)
        self.now = 0.0
        self.converter = Converter(self.memory, self.scheme, *policies, clock=lambda: self.now)
        self.lender = Lender(
            self.memory, self.converter, quiesce_timeout=timeout, clock=lambda: int(self.now * 1e9)
        )
        self.iommu = VirtioIommu()
        self.iommu.lending = self.lender
        self.endpoint = self.iommu.endpoint("blk0", FIRST)
        self.device = IommuMemory(self.memory, self.endpoint)
        self.machine = VirtioMachine(self.iommu, BatchingFakeMemory())
        self.machine.up()
        self._head = self.machine.blank(128).gpa
        self._tail = self.machine.blank(256).gpa

    def another(self, name: str, slot: int) -> tuple[Endpoint, IommuMemory]:
        """One more device behind the IOMMU."""
        endpoint = self.iommu.endpoint(name, slot << 3)
        return endpoint, IommuMemory(self.memory, endpoint)

    def close(self) -> None:
        self.machine.close()
        self.memory.close()

    # -- the driver's requests ----------------------------------------------------------------

    def raw(self, data: bytes, room: int = 4) -> tuple[int, bytes]:
        """Give the device a request and `room` bytes for the answer: how many it says it has
        written, and what is there then."""
        machine = self.machine
        machine.memory.poke(data, self._head)
        machine.memory.poke(b"\xcc" * 256, self._tail)
        written = [Piece(self._tail, room, True)] if room else []
        read = [Piece(self._head, len(data))] if data else []
        machine.give(iommu.REQUESTS, *read, *written)
        machine.kick(iommu.REQUESTS)
        ((_, used),) = machine.queues[iommu.REQUESTS].collect()
        return used, machine.memory.peek(room, self._tail)

    def ask(self, data: bytes) -> int:
        """The status that a request ends with."""
        used, answer = self.raw(data)
        return NOTHING if used == 0 else answer[0]

    def attach(
        self, domain: int = DOMAIN, endpoint: int = FIRST, flags: int = 0, reserved: int = 0
    ) -> int:
        return self.ask(struct.pack("<B3xIIII", iommu.T_ATTACH, domain, endpoint, flags, reserved))

    def detach(self, domain: int = DOMAIN, endpoint: int = FIRST) -> int:
        return self.ask(struct.pack("<B3xII8x", iommu.T_DETACH, domain, endpoint))

    def map(
        self, iova: int, first: int, count: int = 1, flags: int = BOTH, domain: int = DOMAIN
    ) -> int:
        """Map `count` pages from page number `first` at `iova`."""
        return self.map_bytes(iova, page(count), page(first), flags, domain)

    def map_bytes(
        self, iova: int, size: int, gpa: int, flags: int = BOTH, domain: int = DOMAIN
    ) -> int:
        return self.ask(map_request(iova, size, gpa, flags, domain))

    def unmap(self, iova: int, count: int = 1, domain: int = DOMAIN, reserved: int = 0) -> int:
        return self.ask(unmap_request(iova, page(count), domain, reserved))

    def probe(self, endpoint: int = FIRST, room: int = iommu.PROBE_SIZE + 4) -> tuple[int, bytes]:
        return self.raw(struct.pack("<B3xI64x", iommu.T_PROBE, endpoint), room)

    def faults(self) -> list[tuple[int, int, int, int]]:
        """The faults that the device tells of, as (reason, flags, endpoint, address)."""
        machine = self.machine
        found = []
        for _ in range(len(machine.queues[iommu.EVENTS].collect()) + 1):
            room = machine.blank(24)
            machine.give(iommu.EVENTS, room)
            machine.kick(iommu.EVENTS)
            for _, size in machine.queues[iommu.EVENTS].collect():
                reason, *rest = struct.unpack("<B3xII4xQ", machine.text(room, size))
                found.append((reason, *rest))
        return found

    # -- what is so ---------------------------------------------------------------------------

    def state(self, number: int) -> PageState:
        ((_, state),) = self.memory.states(pages(number, 1))
        return state

    def fill(self, number: int, data: bytes) -> None:
        """The guest writes at the start of a page, on the side that it sees there."""
        side = self.shared if number < SHARED_PAGES else self.private
        side.pwrite(data, page(number))

    def content(self, number: int, size: int) -> bytes:
        side = self.shared if number < SHARED_PAGES else self.private
        return side.pread(size, page(number))


def map_request(iova: int, size: int, gpa: int, flags: int = BOTH, domain: int = DOMAIN) -> bytes:
    wrapped = (1 << 64) - 1
    return struct.pack(
        "<B3xIQQQI", iommu.T_MAP, domain, iova, (iova + size - 1) & wrapped, gpa, flags
    )


def unmap_request(iova: int, size: int, domain: int = DOMAIN, reserved: int = 0) -> bytes:
    wrapped = (1 << 64) - 1
    return struct.pack(
        "<B3xIQQI", iommu.T_UNMAP, domain, iova, (iova + size - 1) & wrapped, reserved
    )
