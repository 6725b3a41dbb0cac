"""A machine with one virtio device of any kind, and a guest's driver for it.

What the device waits for on the host is noted, and looked at when the test says `settle`: no
thread and no clock, so that every order can be forced.
"""

from __future__ import annotations

import select
from collections.abc import Callable

from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import (
    Piece,
    VirtioPciDriver,
    VirtioQueueDriver,
)
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.pci_transport import VirtioPciTransport

BAR = 0xC000
RINGS = 0x1000
RING_STRIDE = 0x4000
DATA = 0x40000
MEMORY = 1 << 20


class FakeLoop:
    """EventLoop's verbs for fds, without a thread; they are asked by poll(2)."""

    def __init__(self) -> None:
        self.wanted: dict[int, tuple[Callable[[], None], bool, bool]] = {}
        self.later: dict[int, tuple[Callable[[], None], bool, bool]] = {}

    def add(self, fd: int, callback: Callable[[], None], *, unheld: bool = False) -> None:
        self.watch(fd, callback, readable=True)

    def remove(self, fd: int) -> None:
        self.wanted.pop(fd, None)
        self.later.pop(fd, None)

    def watch(
        self,
        fd: int,
        callback: Callable[[], None],
        *,
        readable: bool = False,
        writable: bool = False,
        unheld: bool = False,
        after: float = 0.0,
    ) -> None:
        self.remove(fd)
        if readable or writable:
            (self.later if after else self.wanted)[fd] = (callback, readable, writable)

    def pass_time(self) -> None:
        """So much that what was to be watched later is watched."""
        self.wanted |= self.later
        self.later.clear()

    def wait(self, seconds: float) -> bool:
        """Wait until something is ready; False when nothing was for so long."""
        return bool(self._poll(seconds))

    def _poll(self, seconds: float) -> list[tuple[int, int]]:
        poll = select.poll()
        for fd, (_, readable, writable) in self.wanted.items():
            poll.register(fd, readable * select.POLLIN | writable * select.POLLOUT)
        return poll.poll(seconds * 1000)

    def run_ready(self) -> bool:
        """Call back what is ready now; whether anything was."""
        ready = [self.wanted[fd][0] for fd, events in self._poll(0) if events != select.POLLNVAL]
        for callback in ready:
            callback()
        return bool(ready)


class VirtioMachine:
    """The device in slot 1. `queues` are the driver's, once it is up."""

    def __init__(self, device: VirtioDevice, memory: FakeMemory | None = None) -> None:
        """`memory` may be anything with FakeMemory's verbs."""
        self.device = device
        self.memory = FakeMemory(MEMORY) if memory is None else memory
        self.loop = FakeLoop()
        self.interrupts = 0
        self.rung: list[int] = []
        self.ports = PortBus()
        self.pci = PciBus(self.ports)
        self.transport = VirtioPciTransport(
            device,
            self.memory,
            self._interrupt,
            bar_base=BAR,
            interrupt_line=5,
            ring=self.rung.append,
            make_queue=device.queue_type,
        )
        device.watch = self.loop.watch
        device.start()
        self.pci.add(0, host_bridge())
        self.pci.add(1, self.transport.function)
        self.driver = VirtioPciDriver(self.pci, self.ports, self.memory, 1)
        self.queues: list[VirtioQueueDriver] = []
        self._next = DATA

    def close(self) -> None:
        self.driver.status = 0
        self.device.disconnect()
        self.device.close()
        self.memory.close()

    def _interrupt(self) -> None:
        self.interrupts += 1

    def up(self, features: int | None = None, size: int = 16, refuse: int = 0) -> None:
        """The driver does all of its initialisation, with all queues and all that is offered
        but `refuse`."""
        driver = self.driver
        driver.enable()
        wanted = driver.offered_features() & ~refuse if features is None else features
        if not driver.negotiate(wanted):
            raise AssertionError(f"features {wanted:#x} refused")
        self.queues = []
        for index in range(driver.get(0x12, 2)):
            queue = VirtioQueueDriver(self.memory, RINGS + RING_STRIDE * index, size)
            driver.set_queue(index, queue.desc, queue.avail, queue.used, size)
            self.queues.append(queue)
        driver.start()

    def room(self, size: int) -> int:
        """A piece of guest memory that nothing else uses."""
        gpa = self._next
        self._next += (size + 15) & ~15
        assert self._next <= self.memory.size
        return gpa

    def place(self, data: bytes) -> Piece:
        """Bytes for the device to read."""
        gpa = self.room(len(data))
        self.memory.poke(data, gpa)
        return Piece(gpa, len(data))

    def blank(self, size: int) -> Piece:
        """Room for the device to write."""
        gpa = self.room(size)
        self.memory.poke(b"\xcc" * size, gpa)
        return Piece(gpa, size, True)

    def give(self, queue: int, *pieces: Piece) -> int:
        """Offer one chain, without a notify; its head."""
        head = self.queues[queue].chain(list(pieces))
        self.queues[queue].offer(head)
        return head

    def kick(self, queue: int) -> None:
        """Notify a queue, and let everything come to rest."""
        self.driver.notify(queue)
        self.settle()

    def settle(self) -> None:
        """Serve what was rung, and what has happened on the host, until there is no more."""
        for _ in range(10_000):
            if self.rung:
                index = self.rung.pop(0)
                self.rung[:] = [other for other in self.rung if other != index]
                self.transport.notify(index)
            elif not self.loop.run_ready():
                return
        raise AssertionError("the device never comes to rest: it would keep a processor busy")

    def text(self, piece: Piece, size: int) -> bytes:
        return self.memory.peek(size, piece.gpa)
