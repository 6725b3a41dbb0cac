"""A driver that means harm: random use of one virtio device's registers, rings and memory.

Guest memory is the real thing: two memfds with private and shared pages. The shared side of
private pages, and what lies past the guest's RAM, is full of canaries. The device must neither
read one (they would come out at its other end) nor write over one.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from typing import cast

from tests.fuzz.drawing import Choices
from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import (
    ACKNOWLEDGE,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
)
from tests.support.virtio_machine import VirtioMachine
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.virtio.device import VirtioDevice
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.engines import make_engine
from vmm.memory.guest_memory import GuestMemory, PageState

PAGES = 64
RAM = PAGES * PAGE_SIZE
BEYOND = 16 * PAGE_SIZE
CANARY = b"\xc5\xa5CANARY\x5a\x5c"
FULL = CANARY * (BEYOND // len(CANARY) + 1)

# The guest's own accesses, which don't fail when the host's calls are made to.
_pread, _pwrite = os.pread, os.pwrite

_EDGES = (0, 1, 2, 4, 15, 16, 0xFF, 0xFFF, 0x1000, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF)
_SIZES = (0, 1, 2, 4, 11, 12, 16, 44, 64, 512, 4096, 65536, RAM, 1 << 31, 0xFFFF_FFFF)


class HostileMemory:
    """FakeMemory's verbs on real guest memory; `convert` changes a page's side.

    `engine` moves what goes between a file and guest memory; a device has the verbs for many
    pieces only with one.
    """

    def __init__(self, engine: str | None = None) -> None:
        self.shared = MemfdBacking(RAM + BEYOND)
        self.guest = GuestMemory(
            (Range(0, RAM),), self.shared, MemfdBacking(RAM + BEYOND), [Range(RAM // 2, RAM // 4)]
        )
        self.size = RAM
        for name in ("pread", "pwrite", "transfer_in", "transfer_out", "discard"):
            setattr(self, name, getattr(self.guest, name))
        if engine is not None:
            through = self.guest.through(make_engine(engine, self.shared))
            for name in ("transfer_in", "transfer_out", "move_in", "move_out", "read_many",
                         "write_many"):  # fmt: skip
                setattr(self, name, getattr(through, name))
        self._fill()

    def _fill(self) -> None:
        _pwrite(self.shared.fd, FULL[:BEYOND], RAM)
        for area, state in self.guest.states():
            if state is not PageState.SHARED:
                _pwrite(self.shared.fd, (FULL * 8)[: area.size], area.start)

    def convert(self, number: int) -> None:
        area = Range(number * PAGE_SIZE, PAGE_SIZE)
        ((_, state),) = self.guest.states(area)
        self.guest.begin_conversion(area)
        if state is PageState.SHARED:
            _pwrite(self.shared.fd, FULL[:PAGE_SIZE], area.start)
            self.guest.finish_conversion(PageState.PRIVATE)
        else:
            _pwrite(self.shared.fd, bytes(PAGE_SIZE), area.start)
            self.guest.finish_conversion(PageState.SHARED)

    def peek(self, size: int, gpa: int) -> bytes:
        return _pread(self.shared.fd, size, gpa)

    def poke(self, data: bytes, gpa: int) -> None:
        """The guest's own write: it may not reach what it made private."""
        area = Range(gpa, max(len(data), 1))
        if gpa >= 0 and area.end <= RAM:
            states = self.guest.states(area)
            if all(state is PageState.SHARED for _, state in states):
                _pwrite(self.shared.fd, data, gpa)

    def check(self) -> None:
        """Every canary is where it was."""
        assert _pread(self.shared.fd, BEYOND, RAM) == FULL[:BEYOND], "written past RAM"
        for area, state in self.guest.states():
            if state is not PageState.SHARED:
                for gpa in range(area.start, area.end, PAGE_SIZE):
                    held = _pread(self.shared.fd, 64, gpa)
                    assert held.count(CANARY[2:8]) >= 5, f"private page {gpa:#x} was written"

    def close(self) -> None:
        self.guest.close()


class HostileDriver:
    """One device and whoever attacks it; `episode` is one life of a driver."""

    def __init__(
        self,
        device: VirtioDevice,
        rng: random.Random,
        *,
        request: Callable[[random.Random], bytes],
        host: Callable[[random.Random], None],
        inputs: frozenset[int],
        sizes: tuple[int, ...],
        tail: int,
        engine: str | None = None,
    ) -> None:
        """`request(rng)` makes the front of a request such as the device knows, `sizes` are those
        of the buffers behind it, `tail` the bytes that the device writes at its end; `inputs` are
        the queues that only take buffers. `host(rng)` does something at the device's other end.
        `engine`: HostileMemory's."""
        self.rng = rng
        self.memory = HostileMemory(engine)
        self.second_vcpu = False
        """Whether another vCPU moves indexes and flips descriptors whenever the device reads."""
        self.moves = 0
        self.most_moves = 1 << 62
        """How many of these there are: a device whose queue is never empty is at work for ever."""
        self._second_vcpu_reads()
        self.machine = VirtioMachine(device, memory=cast(FakeMemory, self.memory))
        self._request = request
        self._host = host
        self._queues = len(device.queue_sizes)
        self._size = 16
        self._inputs, self._sizes, self._tail = inputs, sizes, tail
        self._places = [0] * self._queues
        # How often a move breaks a rule in this life: some get far, some not beyond hello.
        self._harm = 0.0
        self.kicks = 0.7  # how often a chain is served at once
        self._work: list[Callable[[], None]] = [self._offer, self._offer, self._notify,
                                                self._at_the_host]  # fmt: skip
        self._mischief: list[Callable[[], None]] = [
            self._jump_index, self._scribble, self._write_register, self._write_config,
            self._read_anything, self._pci, self._convert, self._reset, self._late_features,
            self._requeue,
        ]  # fmt: skip

    def close(self) -> None:
        self.memory.check()
        self.machine.close()

    def episode(self, steps: int) -> None:
        rng = self.rng
        self._harm = rng.choice((0.0, 0.02, 0.1, 0.5))
        self._bring_up()
        for _ in range(steps):
            if isinstance(rng, Choices) and rng.spent:
                break
            rng.choice(self._mischief if rng.random() < self._harm else self._work)()
            if self.machine.driver.status & NEEDS_RESET and rng.random() < 0.3:
                self._bring_up()
        self.machine.settle()
        self.memory.check()

    def leave_work(self, chains: int) -> None:
        """A new driver that does no harm, and requests that nobody was told of."""
        self._harm = self.kicks = 0.0
        self._bring_up()
        for _ in range(chains):
            self._offer()

    def _second_vcpu_reads(self) -> None:
        """The other vCPU acts right behind each of the device's reads of an available index."""
        pread = self.memory.guest.pread

        def read(size: int, gpa: int) -> bytes:
            data = pread(size, gpa)
            self._after_read(size, gpa, data)
            return data

        def read_many(pieces: list[int]) -> bytes | bytearray:
            data = self.memory.guest.read_many(pieces)
            self._after_read(pieces[1], pieces[0], bytes(data[:4]))
            return data

        self.memory.pread = read  # type: ignore[attr-defined]
        if hasattr(self.memory, "read_many"):
            self.memory.read_many = read_many

    def _after_read(self, size: int, gpa: int, data: bytes) -> None:
        index, offset = divmod(gpa, 0x2000)
        is_at_it = self.second_vcpu and self.moves < self.most_moves
        if is_at_it and size == 4 and offset == 0x800 and index < 12:
            self._move_index(gpa, data)

    def _move_index(self, avail: int, seen: bytes) -> None:
        self.moves += 1
        flags, index = struct.unpack("<HH", seen)
        step = self.rng.choice((1, 1, 1, 2, self._size))
        self.memory.poke(struct.pack("<HH", flags, (index + step) & 0xFFFF), avail)
        if self.rng.random() < 0.2:
            slot = avail + 4 + 2 * self.rng.randrange(self._size)
            self.memory.poke(struct.pack("<H", self.rng.randrange(self._size)), slot)

    # --- moves ---

    def _bring_up(self) -> None:
        rng, driver = self.rng, self.machine.driver
        for number in range(PAGES):  # most pages are shared again, so that something works
            ((_, state),) = self.memory.guest.states(Range(number * PAGE_SIZE, PAGE_SIZE))
            if state is not PageState.SHARED and rng.random() < 0.7:
                self.memory.convert(number)
        driver.enable()
        features = driver.offered_features()
        if rng.random() < 0.6:
            features &= rng.getrandbits(64) | 3 << 32
        if not driver.negotiate(features):
            return
        self._size = rng.choice((1, 2, 4, 8, 16, 16, 16, 64))
        for index in range(self._queues):
            if rng.random() >= self._harm / 5:
                self._set_up(index)
        driver.start()

    def _rings(self, index: int) -> tuple[int, int, int]:
        base = (index % 12) * 0x2000
        return base, base + 0x800, base + 0x1000

    def _set_up(self, index: int) -> None:
        desc, avail, used = self._rings(index)
        if self.rng.random() < self._harm / 10:
            desc = self._address()
        if self.rng.random() < self._harm / 10:
            used = self._address()
        self._places[index] = 0
        self.memory.poke(bytes(0x1800), self._rings(index)[0])
        self.machine.driver.set_queue(index, desc, avail, used, self._size)

    def _address(self) -> int:
        rng = self.rng
        return rng.choice(
            (
                rng.randrange(RAM),
                rng.randrange(0x18000, RAM // 2),
                RAM - rng.choice(_EDGES),
                RAM + rng.choice(_EDGES),
                (1 << 64) - rng.choice(_EDGES) - 1,
                rng.choice(_EDGES),
                rng.getrandbits(64),
            )
        ) & ((1 << 64) - 1)

    def _buffer(self) -> tuple[int, int]:
        rng = self.rng
        if rng.random() >= self._harm / 2:
            size = rng.choice(self._sizes)
            return rng.randrange(0x18000, RAM // 2 - 6000), size
        return self._address(), rng.choice(_SIZES)

    def _offer(self) -> None:
        """A chain: a request's front, buffers after it, most of the time as the rules have it."""
        rng = self.rng
        index = rng.randrange(self._queues)
        pieces = []
        if index in self._inputs and rng.random() >= self._harm / 5:
            pieces = [(*self._buffer(), DESC_WRITE) for _ in range(rng.choice((1, 1, 2)))]
        else:
            front = self._request(rng)
            gpa = rng.randrange(0x18000, RAM // 2 - 8192)
            self.memory.poke(front, gpa)
            if front and rng.random() >= self._harm / 5:
                pieces = [(gpa, len(front), 0)]
            for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
                pieces.append((*self._buffer(), rng.choice((0, DESC_WRITE, DESC_WRITE))))
            if rng.random() >= self._harm / 5:
                pieces.sort(key=lambda piece: piece[2])
                if self._tail:
                    pieces.append((rng.randrange(0x18000, RAM // 2), self._tail, DESC_WRITE))
        if not pieces:
            return
        self._write_chain(index, pieces)

    def _write_chain(self, index: int, pieces: list[tuple[int, int, int]]) -> None:
        rng = self.rng
        desc, avail, _ = self._rings(index)
        place = self._places[index] % self._size
        direct = len(pieces) <= self._size and rng.random() < 0.75
        first = place if direct else 0
        rows = []
        for i, (gpa, size, flags) in enumerate(pieces):
            last = i + 1 == len(pieces)
            following = (first + i + 1) % self._size if direct else i + 1
            if rng.random() < self._harm / 20:
                following = rng.choice((0, i, self._size, 0xFFFF))  # loops, and out of the table
                last = False
            rows.append(struct.pack(
                "<QIHH", gpa, size & 0xFFFF_FFFF, flags | (0 if last else DESC_NEXT), following
            ))  # fmt: skip
        table = b"".join(rows)
        if not direct:
            at = rng.randrange(0x18000, RAM // 2 - 8192) & ~15
            self.memory.poke(table, at)
            size = len(table) if rng.random() >= self._harm / 5 else rng.choice(_SIZES)
            flags = DESC_INDIRECT | (DESC_NEXT if rng.random() < self._harm / 10 else 0)
            rows = [struct.pack("<QIHH", at, size & 0xFFFF_FFFF, flags, 0)]
        head = rng.getrandbits(16) if rng.random() < self._harm / 20 else place
        for i, row in enumerate(rows):
            self.memory.poke(row, desc + 16 * ((place + i) % self._size))
        self._places[index] += len(rows)
        (flags, available) = struct.unpack("<HH", self.memory.peek(4, avail))
        slot = avail + 4 + 2 * (available % self._size)
        self.memory.poke(struct.pack("<H", head), slot)
        self.memory.poke(struct.pack("<HH", flags, (available + 1) & 0xFFFF), avail)
        if rng.random() < self.kicks:
            self.machine.driver.notify(index)
            self.machine.settle()

    def _notify(self) -> None:
        self.machine.driver.notify(self.rng.choice((*range(self._queues), 0xFFFF, 99)))
        if self.rng.random() < 0.7:
            self.machine.settle()

    def _jump_index(self) -> None:
        _, avail, _ = self._rings(self.rng.randrange(self._queues))
        index = self.rng.choice((self.rng.getrandbits(16), self._size))
        self.memory.poke(struct.pack("<HH", self.rng.getrandbits(16), index), avail)

    def _scribble(self) -> None:
        self.memory.poke(self.rng.randbytes(self.rng.choice((1, 2, 16, 200))), self._address())

    def _write_register(self) -> None:
        if self.rng.random() < 0.3:
            offset, size = self.rng.randrange(0x100), self.rng.choice((1, 2, 4))
            base = self.machine.driver.bar
            self.machine.ports.write(base + offset, size, self._value(size))

    def _write_config(self) -> None:
        driver = self.machine.driver
        if driver.device_config:
            offset, size = self.rng.randrange(64), self.rng.choice((1, 2, 4))
            self.machine.ports.write(driver.device_config + offset, size, self._value(size))

    def _value(self, size: int) -> int:
        mask = (1 << (8 * size)) - 1
        return self.rng.choice((self.rng.getrandbits(32), *_EDGES)) & mask

    def _read_anything(self) -> None:
        offset, size = self.rng.randrange(0x104), self.rng.choice((1, 2, 4))
        value = self.machine.ports.read(self.machine.driver.bar + offset, size)
        assert 0 <= value < 1 << (8 * size)

    def _pci(self) -> None:
        register, size = self.rng.randrange(0x104), self.rng.choice((1, 2, 4))
        if self.rng.random() < 0.5:
            self.machine.driver.config(register, size)
        else:
            self.machine.driver.set_config(register, size, self._value(size))
        if self.rng.random() < 0.8:  # or it would soon be nowhere
            self.machine.driver.set_config(0x10, 4, self.machine.driver.bar)
            self.machine.driver.enable()

    def _convert(self) -> None:
        self.memory.convert(self.rng.randrange(PAGES))

    def _reset(self) -> None:
        if self.rng.random() < 0.3:
            self.machine.driver.status = self.rng.choice((0, 0, 0x80, 0xFF))
            if self.rng.random() < 0.8:
                self._bring_up()

    def _late_features(self) -> None:
        driver = self.machine.driver
        driver.put(0x08, 4, self.rng.choice((0, 1, 2)))
        driver.put(0x0C, 4, self.rng.getrandbits(32))
        if self.rng.random() < 0.2:
            driver.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

    def _requeue(self) -> None:
        if self.rng.random() < 0.2:
            self._set_up(self.rng.randrange(self._queues))

    def _at_the_host(self) -> None:
        self._host(self.rng)
        self.machine.settle()
