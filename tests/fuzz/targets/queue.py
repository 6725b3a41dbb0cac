"""The split virtqueue: rings and chains of a hostile driver, followed in C and in Python."""

from __future__ import annotations

import struct

from tests.fuzz.drawing import patched, patches
from tests.fuzz.targets.registry import target
from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import DESC_INDIRECT, Piece, VirtioQueueDriver
from vmm.core.errors import GuestMemoryError, PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE
from vmm.devices.virtio.queue import (
    ADDRESS_SPACE,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    MAX_CHAIN_BYTES,
    Chain,
    QueueError,
    SplitQueue,
)

MEMORY = 1 << 16
PRIVATE = MEMORY - PAGE_SIZE
"""Where private memory begins, which the device must not touch."""
_BASE = 0x1000
_ROUNDS = 4
_HEAD = struct.Struct("<4B4H4B")
_MOST_ACCESSES = 64 * 4
"""For each turn of 64 entries: rings, and a table for each entry."""


class _Memory:
    """Guest memory in a bytearray; what was written is noted."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.accesses = 0
        self.written: list[tuple[int, bytes]] = []

    def _check(self, size: int, gpa: int) -> None:
        self.accesses += 1
        if gpa < 0 or size < 0 or gpa + size > MEMORY:
            raise UnmappedAccess(f"{size:#x} bytes at {gpa:#x}")
        if gpa + size > PRIVATE:
            raise PrivateAccess(f"{size:#x} bytes at {gpa:#x}")

    def pread(self, size: int, gpa: int) -> bytes:
        self._check(size, gpa)
        return bytes(self.content[gpa : gpa + size])

    def pwrite(self, data: bytes, gpa: int) -> None:
        self._check(len(data), gpa)
        self.content[gpa : gpa + len(data)] = data
        self.written.append((gpa, bytes(data)))


class _BatchMemory(_Memory):
    """With verbs for many pieces, so that chains are followed in C."""

    def read_many(self, pieces: list[int]) -> bytes:
        pairs = list(zip(pieces[::2], pieces[1::2], strict=True))
        return b"".join([self.pread(size, gpa) for gpa, size in pairs])

    def write_many(self, pieces: list[int], data: bytes) -> None:
        pairs = list(zip(pieces[::2], pieces[1::2], strict=True))
        for gpa, size in pairs:
            self._check(size, gpa)
        done = 0
        for gpa, size in pairs:
            self.pwrite(data[done : done + size], gpa)
            done += size
        assert done == len(data)


class _Refused(Exception):
    """Memory was refused: which of several accesses meets it first is nobody's rule."""


class _Life:
    """One queue until it breaks; `take` and `give_back` are a turn's two halves."""

    def __init__(self, memory: _Memory, size: int, features: int) -> None:
        driver_like = (_BASE, _BASE + 16 * size, (_BASE + 18 * size + 6 + 3) & ~3)
        self.memory = memory
        self.desc, self.avail, self.used = driver_like
        self.queue = SplitQueue(memory, size, *driver_like, features)
        self.broken: str | None = None
        self.returned = 0

    def take(self, index: int, most: int) -> list[Chain]:
        self.memory.content[self.avail + 2 : self.avail + 4] = struct.pack("<H", index)
        self.queue.budget.begin()
        self.memory.accesses = 0
        try:
            chains = self.queue.take(most)
        except QueueError as error:
            self.broken = str(error)
            return []
        except GuestMemoryError:
            raise _Refused from None
        assert self.memory.accesses <= _MOST_ACCESSES, self.memory.accesses
        assert len(chains) <= most and self.queue.outstanding <= self.queue.size
        for chain in chains:
            _check_chain(chain, self.queue.size)
        return chains

    def give_back(self, chains: list[Chain]) -> bool:
        """Return them; every element is where the driver looks for it, and nothing else changed."""
        used = [(chain.head, sum(size for _, size in chain.writable)) for chain in chains]
        before = bytearray(self.memory.content)
        try:
            wants = self.queue.publish(used)
        except GuestMemoryError:
            raise _Refused from None
        for head, written in used:
            at = self.used + 4 + 8 * (self.returned % self.queue.size)
            before[at : at + 8] = struct.pack("<II", head, written)
            self.returned += 1
        if used:
            index = struct.pack("<H", self.returned & 0xFFFF)
            before[self.used + 2 : self.used + 4] = index
        assert before == self.memory.content, "the device wrote elsewhere"
        return wants


def _check_chain(chain: Chain, size: int) -> None:
    assert 0 <= chain.head < size
    pieces = [*chain.readable, *chain.writable]
    assert all(length > 0 and gpa + length <= ADDRESS_SPACE for gpa, length in pieces)
    assert sum(length for _, length in pieces) < MAX_CHAIN_BYTES


def _seeds() -> list[bytes]:
    """Rings as a driver writes them: chains, an indirect table, a wrap of the ring; and wrong."""
    made = []
    for features, log in ((0, 3), (3, 3), (1, 2), (2, 4)):
        memory = FakeMemory(MEMORY)
        driver = VirtioQueueDriver(memory, _BASE, 1 << log)
        driver.used = (_BASE + (18 << log) + 6 + 3) & ~3
        heads = [
            driver.chain([Piece(0x4000, 16), Piece(0x5000, 512, True)]),
            driver.chain([Piece(0x6000, 1, True)]),
        ]
        if features & 1:
            table = struct.pack("<QIHHQIHH", 0x7000, 8, 1, 1, 0x7100, 4, 2, 0)
            memory.poke(table, 0x3000)
            driver.descriptor(3, 0x3000, 32, DESC_INDIRECT, 0)
            heads.append(3)
        driver.offer(*heads)
        image = memory.peek(MEMORY, 0)
        memory.close()
        count = len(heads)
        head = _HEAD.pack(log, features, 0, 0, count, count, 2 * count, 3 * count, 9, 9, 1, 9)
        made.append(head + patches(bytes(MEMORY), image))
    return made


@target("queue", _seeds, longest=1024)
def queue(data: bytes) -> None:
    """A head (size, features; for each turn the available index and how many to take), then
    patches of memory. Both ways to follow chains find the same, and return it once."""
    log, features, *rounds = _HEAD.unpack(data[: _HEAD.size].ljust(_HEAD.size, b"\0"))
    rounds = rounds[2:]
    content = patched(bytes(MEMORY), data[_HEAD.size :])
    agreed = (F_INDIRECT_DESC if features & 1 else 0) | (F_EVENT_IDX if features & 2 else 0)
    size = 1 << log % 7
    lives = [_Life(kind(content), size, agreed) for kind in (_Memory, _BatchMemory)]
    try:
        for turn in range(_ROUNDS):
            index, most = rounds[turn], rounds[_ROUNDS + turn]
            first, second = (life.take(index, most) for life in lives)
            assert first == second
            assert lives[0].broken == lives[1].broken
            if lives[0].broken is not None:
                assert lives[0].broken.isprintable()
                break
            one, other = (life.give_back(first) for life in lives)
            assert one == other
    except _Refused:
        return
