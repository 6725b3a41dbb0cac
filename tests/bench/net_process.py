"""A network card in a process of its own against one in pyvmm's: frames a second, and messages.

    python -m tests.bench.net_process [ROUNDS] [--seconds N] [--only WORDS]

No guest runs. A process of its own has the driver: it writes rings in the same memory, notifies by
an eventfd and sleeps until it is interrupted by another one, with event indexes, as Linux does. The
card is on the real event loop. What it sends goes to /dev/null, and what it receives is as many
frames of zeroes as the driver says. So what is measured is the card, its rings and the messages,
and neither a network nor a guest's network stack.

Each round measures both places one after the other, in alternating order. Frames a second, medians,
and the median of the rounds' ratios: how quick the card in a process is, times the other. Then how
many messages a frame was, of all kinds.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import time
from collections import Counter
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any, NamedTuple, cast

from tests.bench.loop_latency import MIB, Ram
from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import DESC_INDIRECT, DESC_NEXT, DESC_WRITE
from tests.support.virtio_machine import VirtioMachine
from vmm.core.event_loop import EventLoop, drain
from vmm.devices.process import protocol
from vmm.devices.process.front_end import ProcessDevice
from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio.net import HEADER_SIZE, QUEUE_SIZE, RX, TX, VirtioNet
from vmm.devices.virtio.queue import F_INDIRECT_DESC

PLACES = ("in pyvmm", "in a process")
FRAMES = 64 * MIB
"""Where the frames are in the guest's memory."""
TABLES = FRAMES - 4 * MIB
"""Where the tables are that name them."""
_U16 = struct.Struct("<H")


class Test(NamedTuple):
    """What one line of the result measures."""

    queue: int
    size: int
    window: int
    """Frames under way at most."""
    pieces: int = 1
    """Descriptors of a frame that is sent."""
    buffer: int = 1536
    """Bytes of a buffer to receive into."""

    @property
    def name(self) -> str:
        how = "sent" if self.queue == TX else "received"
        return f"{how}, {self.size} bytes, {self.window} at a time"

    @property
    def buffers(self) -> int:
        """How many of them a frame takes that is received."""
        return -(-(HEADER_SIZE + self.size) // self.buffer)


LARGE = 65000
"""A frame of several segments: as many bytes as Linux' TCP puts into one."""
TESTS = (
    Test(TX, 64, 64),
    Test(TX, 1500, 64, pieces=2),
    Test(TX, LARGE, 8, pieces=17),
    Test(TX, 64, 1),
    Test(TX, LARGE, 1, pieces=17),
    Test(RX, 64, 64),
    Test(RX, 1500, 64),
    Test(RX, LARGE, 8, buffer=3584),
    Test(RX, 64, 1),
    Test(RX, LARGE, 1, buffer=3584),
)


class Wire:
    """Takes everything, and gives as many frames as its eventfd says."""

    features = 0
    is_stream = False

    def __init__(self, size: int) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._null = os.open("/dev/null", os.O_WRONLY)
        self._zero = os.open("/dev/zero", os.O_RDONLY)
        self._size = HEADER_SIZE + size

    @property
    def descriptors(self) -> list[int]:
        return [self.fd, self._null, self._zero]

    def set_offloads(self, features: int) -> None:
        pass

    def receive(self) -> bytes | None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return None
        return os.read(self._zero, self._size)

    def send(self, frame: bytes) -> bool:
        os.write(self._null, frame)
        return True

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        for fd in self.descriptors:
            os.close(fd)


class Memory(Ram):
    """Guest memory as a card gets it: without an engine."""

    def __init__(self) -> None:
        super().__init__()
        for verb in ("transfer_in", "transfer_out", "move_in", "move_out"):
            del self.__dict__[verb]


class Driver:
    """One queue's, in a process of its own."""

    def __init__(self, test: Test, rings: Any, fd: int, kick: int, interrupt: int, wire: int):
        self._test = test
        self._memory = mmap.mmap(fd, FRAMES)
        self._size = rings.size
        self._avail, self._used = rings.avail, rings.used
        self._kick, self._interrupt, self._wire = kick, interrupt, wire
        self._given = self._done = 0  # chains

    def _read(self, gpa: int) -> int:
        return int(_U16.unpack_from(self._memory, gpa)[0])

    def _write(self, number: int, gpa: int) -> None:
        _U16.pack_into(self._memory, gpa, number & 0xFFFF)

    def _give(self, count: int) -> None:
        self._given += count
        self._write(self._given, self._avail + 2)
        event = self._read(self._used + 4 + 8 * self._size)
        if (self._given - event - 1) & 0xFFFF < count:
            os.eventfd_write(self._kick, 1)

    def _take(self) -> int:
        """How many chains have come back since the last call."""
        new = (self._read(self._used + 2) - self._done) & 0xFFFF
        self._done += new
        return new

    def _sleep(self, until: int) -> None:
        """Until so many chains have come back."""
        event = self._avail + 4 + 2 * self._size
        self._write(until - 1, event)
        while self._read(self._used + 2) == self._done & 0xFFFF:
            os.eventfd_read(self._interrupt)
        self._write(self._done + 0x7FFF, event)

    def run(self, seconds: float) -> float:
        """Frames a second."""
        go = self._send if self._test.queue == TX else self._receive
        if self._test.queue == RX:
            self._give(self._size)
        go(self._test.window * 4)
        started, frames = time.monotonic(), 0
        while (taken := time.monotonic() - started) < seconds:
            go(self._test.window * 32)
            frames += self._test.window * 32
        return frames / taken

    def _send(self, frames: int) -> None:
        end = self._given + frames
        while self._done < end:
            room = min(self._test.window - (self._given - self._done), end - self._given)
            if room:
                self._give(room)
            if not self._take():
                under_way = self._given - self._done
                self._sleep(self._done + 1 + under_way * 3 // 4 * (under_way > 1))

    def _receive(self, frames: int) -> None:
        """The network has as many frames as the window, again and again."""
        each = self._test.buffers
        start, sent = self._done, 0
        while self._done < start + frames * each:
            done = (self._done - start) // each
            room = min(self._test.window - (sent - done), frames - sent)
            if room:
                os.eventfd_write(self._wire, room)
                sent += room
            if not self._take():
                self._sleep(self._done + 1)
                continue
            used_up = self._size - (self._given - self._done)
            if used_up > self._size // 2:
                self._give(used_up)


class Rig:
    """A machine with one card, on a real loop, and the process of its driver."""

    def __init__(self, test: Test, *, apart: bool) -> None:
        self.messages: Counter[int] = Counter()
        self._test = test
        self.wire = Wire(test.size)
        net = VirtioNet(self.wire, b"\2\0\0\0\0\1")
        net.wants_process = apart
        self._spawner = Spawner(None) if apart else None
        device: VirtioNet | ProcessDevice = net
        if self._spawner is not None:
            number = self._spawner.add(Job(net, [], self.wire.descriptors))
            self._spawner.begin()
            device = ProcessDevice(net, "net0", number, self._spawner, config_without=net.config())
            self._count(device)
        self.machine = machine = VirtioMachine(device, memory=cast(FakeMemory, Memory()))
        self.loop = EventLoop()
        machine.loop = cast(Any, self.loop)
        device.watch = self.loop.watch
        if isinstance(device, ProcessDevice):
            device.set_timer = self.loop.set_timer
            assert device._socket is not None
            self.loop.watch(device._socket.fileno(), device._ready, readable=True)
        self._ringing: set[int] = set()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        machine.transport._ring = self._ring
        device.wake = self._ring
        self.loop.add(self._bell, self._rung)
        self._kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.loop.add(self._kick, self._kicked)
        self._interrupt = os.eventfd(0)
        machine.transport._interrupt = lambda: os.eventfd_write(self._interrupt, 1)
        machine.up(size=QUEUE_SIZE)
        self._fill()

    def _count(self, device: ProcessDevice) -> None:
        obey, say = device._obey, device._say

        def counted_obey(size: int) -> int | None:
            self.messages[device._buffer[0]] += 1
            return obey(size)

        def counted_say(what: int, *rest: Any) -> None:
            self.messages[what] += 1
            say(what, *rest)

        device._obey = counted_obey  # type: ignore[method-assign]
        device._say = counted_say  # type: ignore[method-assign, assignment]

    def _ring(self, queue: int) -> None:
        self._ringing.add(queue)
        os.eventfd_write(self._bell, 1)

    def _rung(self) -> None:
        drain(self._bell)
        while self._ringing:
            self.machine.transport.notify(self._ringing.pop())

    def _kicked(self) -> None:
        drain(self._kick)
        self.machine.transport.notify(self._test.queue)

    def _fill(self) -> None:
        """Descriptors and the available ring, which stay as they are."""
        test, driver = self._test, self.machine.queues[self._test.queue]
        if test.queue == RX:
            for i in range(QUEUE_SIZE):
                driver.descriptor(i, FRAMES + 4096 * i, test.buffer, DESC_WRITE, 0)
            heads = list(range(QUEUE_SIZE))
        else:
            heads = [self._chain(driver, i) for i in range(test.window)]
        ring = struct.pack(f"<{QUEUE_SIZE}H", *(heads * (QUEUE_SIZE // len(heads))))
        self.machine.memory.poke(ring, driver.avail + 4)

    def _chain(self, driver: Any, i: int) -> int:
        """A header and its frame, in as many pieces as Linux has; where it may, in a table."""
        test = self._test
        size = HEADER_SIZE + test.size
        starts = [0, *(66 + n * (size - 66) // (test.pieces - 1) for n in range(test.pieces - 1))]
        ends = [*starts[1:], size]
        at, count = FRAMES + i * (1 << 18), test.pieces
        rows = [
            (at + 8192 * n, end - start, DESC_NEXT if n + 1 < count else 0, n + 1)
            for n, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        if count > 1 and self.machine.transport._offered & F_INDIRECT_DESC:
            table = b"".join(struct.pack("<QIHH", *row) for row in rows)
            self.machine.memory.poke(table, TABLES + 4096 * i)
            driver.descriptor(i, TABLES + 4096 * i, len(table), DESC_INDIRECT, 0)
            return i
        for n, (gpa, length, flags, _) in enumerate(rows):
            driver.descriptor(count * i + n, gpa, length, flags, count * i + n + 1)
        return count * i

    def measure(self, seconds: float) -> float:
        """Frames a second."""
        near, far = os.pipe()
        memory = cast(Ram, self.machine.memory)
        pid = os.fork()
        if pid == 0:
            try:
                driver = Driver(
                    self._test, self.machine.queues[self._test.queue], memory.backing.fd,
                    self._kick, self._interrupt, self.wire.fd,
                )  # fmt: skip
                os.write(far, struct.pack("d", driver.run(seconds)))
            finally:
                os._exit(0)
        os.close(far)
        self.loop.add(near, self.loop.stop)
        self.loop.run()
        (rate,) = struct.unpack("d", os.read(near, 8))
        os.close(near)
        os.waitpid(pid, 0)
        return float(rate)

    def frames(self) -> int:
        return self.machine.device.statistics.requests

    def close(self) -> None:
        self.machine.close()
        if self._spawner is not None:
            self._spawner.close()
        self.loop.close()
        for fd in (self._bell, self._kick, self._interrupt):
            os.close(fd)


_NAMES = {
    number: name
    for name, number in vars(protocol).items()
    if name in ("KICK", "ANSWER", "READ", "WRITE", "RETURN", "TURN")
}


def in_turns(test: Test, rounds: int, seconds: float) -> tuple[dict[str, list[float]], str]:
    """By place the frames a second of each round; and what a frame had of messages."""
    rates: dict[str, list[float]] = {place: [] for place in PLACES}
    said: Counter[int] = Counter()
    frames = 0
    for number in range(rounds):
        order: Callable[[tuple[str, ...]], Any] = iter if number % 2 == 0 else reversed
        for place in order(PLACES):
            rig = Rig(test, apart=place == PLACES[1])
            rates[place].append(rig.measure(seconds))
            if place == PLACES[1]:
                said += rig.messages
                frames += rig.frames()
            rig.close()
    each = ", ".join(
        f"{name} {said[number] / max(frames, 1):.2f}" for number, name in sorted(_NAMES.items())
    )
    return rates, f"{sum(said.values()) / max(frames, 1):.2f} ({each})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=8)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--only", default="", help="tests whose name has this")
    arguments = parser.parse_args()
    print(f"{'':<36}{'in pyvmm':>10}{'process':>10}   ratio (quartiles)   messages a frame")
    for test in TESTS:
        if arguments.only not in test.name:
            continue
        rates, messages = in_turns(test, arguments.rounds, arguments.seconds)
        here, there = (rates[place] for place in PLACES)
        ratios = [other / one for one, other in zip(here, there, strict=True)]
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(
            f"{test.name:<36}{median(here):>10,.0f}{median(there):>10,.0f}"
            f"   {middle:.2f} ({low:.2f}..{high:.2f})   {messages}"
        )


if __name__ == "__main__":
    main()
