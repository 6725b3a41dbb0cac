"""The guest's side of virtio-pci: configuration space, port accesses and rings in its memory.

It knows the specification and nothing of the devices: offsets come from the capabilities that
it finds. `VirtioQueueDriver` writes what it is told to, also what no honest driver would.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.support.fake_memory import FakeMemory
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus

DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4
VERSION_1, ACCESS_PLATFORM = 1 << 32, 1 << 33
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64


@dataclass(slots=True)
class Piece:
    """One descriptor of a chain."""

    gpa: int
    size: int
    writable: bool = False


@dataclass(slots=True)
class Capability:
    """A virtio structure as its capability describes it."""

    register: int
    bar: int
    offset: int
    length: int


class VirtioQueueDriver:
    """One split queue in guest memory at `base` (page aligned; three pages are enough for 128)."""

    def __init__(self, memory: FakeMemory, base: int, size: int) -> None:
        self.memory = memory
        self.size = size
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 4095) & ~4095
        self.available = 0
        self.seen = 0
        self._next = 0
        self.set_available_index(0)
        memory.poke(bytes(4 + 8 * size), self.used)

    def descriptor(self, index: int, gpa: int, size: int, flags: int, following: int) -> None:
        self.memory.poke(struct.pack("<QIHH", gpa, size, flags, following), self.desc + 16 * index)

    def chain(self, pieces: list[Piece]) -> int:
        """Write descriptors for `pieces`; returns the head."""
        indexes = [(self._next + i) % self.size for i in range(len(pieces))]
        self._next = (self._next + len(pieces)) % self.size
        for i, piece in enumerate(pieces):
            last = i + 1 == len(pieces)
            flags = (DESC_WRITE if piece.writable else 0) | (0 if last else DESC_NEXT)
            self.descriptor(indexes[i], piece.gpa, piece.size, flags, 0 if last else indexes[i + 1])
        return indexes[0]

    def offer(self, *heads: int) -> None:
        """Put heads on the available ring and move its index over them."""
        for head in heads:
            slot = self.avail + 4 + 2 * (self.available % self.size)
            self.memory.poke(struct.pack("<H", head), slot)
            self.available = (self.available + 1) & 0xFFFF
        self.set_available_index(self.available)

    def set_available_index(self, index: int, flags: int = 0) -> None:
        self.memory.poke(struct.pack("<HH", flags, index), self.avail)

    def used_index(self) -> int:
        (index,) = struct.unpack("<H", self.memory.peek(2, self.used + 2))
        return int(index)

    def collect(self) -> list[tuple[int, int]]:
        """Used elements (head, length) that were not there at the last call."""
        elements = []
        while self.seen != self.used_index():
            slot = self.used + 4 + 8 * (self.seen % self.size)
            head, length = struct.unpack("<II", self.memory.peek(8, slot))
            elements.append((head, length))
            self.seen = (self.seen + 1) & 0xFFFF
        # With event indexes: an interrupt, please, for the next one. Else a field nobody reads.
        self.memory.poke(struct.pack("<H", self.seen), self.avail + 4 + 2 * self.size)
        return elements

    def notify_event(self) -> int:
        """With event indexes: the available index that the device wants to be notified of."""
        (index,) = struct.unpack("<H", self.memory.peek(2, self.used + 4 + 8 * self.size))
        return int(index)


class VirtioPciDriver:
    """Finds the device in `slot`, and drives its registers by IN and OUT."""

    def __init__(self, pci: PciBus, ports: PortBus, memory: FakeMemory, slot: int) -> None:
        self.pci = pci
        self.ports = ports
        self.memory = memory
        self.slot = slot
        self.bar = self.config(0x10, 4) & ~3
        self.capabilities = self._find_capabilities()
        self.common = self.bar + self.capabilities[1].offset
        self.notify_port = self.bar + self.capabilities[2].offset
        self.isr_port = self.bar + self.capabilities[3].offset
        # A device may have no configuration of its own (virtio-rng).
        self.device_config = self.bar + self.capabilities[4].offset if 4 in self.capabilities else 0

    def config(self, register: int, size: int) -> int:
        return self.pci.read_config(0, self.slot, 0, register, size)

    def set_config(self, register: int, size: int, value: int) -> None:
        self.pci.write_config(0, self.slot, 0, register, size, value)

    def enable(self) -> None:
        """I/O decoding and bus mastering."""
        self.set_config(0x04, 2, 0x5)

    def get(self, offset: int, size: int) -> int:
        return self.ports.read(self.common + offset, size)

    def put(self, offset: int, size: int, value: int) -> None:
        self.ports.write(self.common + offset, size, value)

    @property
    def status(self) -> int:
        return self.get(0x14, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.put(0x14, 1, value)

    def offered_features(self) -> int:
        features = 0
        for select in range(2):
            self.put(0x00, 4, select)
            features |= self.get(0x04, 4) << (32 * select)
        return features

    def negotiate(self, features: int) -> bool:
        """3.1.1 up to FEATURES_OK; whether the device accepted."""
        self.status = 0
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        for select in range(2):
            self.put(0x08, 4, select)
            self.put(0x0C, 4, (features >> (32 * select)) & 0xFFFF_FFFF)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        return bool(self.status & FEATURES_OK)

    def set_queue(self, index: int, desc: int, driver: int, device: int, size: int) -> None:
        self.put(0x16, 2, index)
        self.put(0x18, 2, size)
        for offset, gpa in ((0x20, desc), (0x28, driver), (0x30, device)):
            self.put(offset, 4, gpa & 0xFFFF_FFFF)
            self.put(offset + 4, 4, gpa >> 32)
        self.put(0x1C, 2, 1)

    def start(self) -> None:
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

    def bring_up(self, features: int, base: int, size: int) -> VirtioQueueDriver:
        """Everything up to DRIVER_OK with one queue; the queue."""
        self.enable()
        if not self.negotiate(features):
            raise AssertionError(f"the device refused features {features:#x}")
        queue = VirtioQueueDriver(self.memory, base, size)
        self.set_queue(0, queue.desc, queue.avail, queue.used, size)
        self.start()
        return queue

    def notify(self, queue_index: int = 0) -> None:
        self.ports.write(self.notify_port, 2, queue_index)

    def isr(self) -> int:
        return self.ports.read(self.isr_port, 1)

    def _find_capabilities(self) -> dict[int, Capability]:
        """The first capability of each type, as 4.1.4 asks."""
        found: dict[int, Capability] = {}
        register = self.config(0x34, 1)
        while register:
            if self.config(register, 1) == 0x09:
                kind = self.config(register + 3, 1)
                bar = self.config(register + 4, 1)
                offset = self.config(register + 8, 4)
                length = self.config(register + 12, 4)
                found.setdefault(kind, Capability(register, bar, offset, length))
            register = self.config(register + 1, 1)
        return found
