"""How long a hostile guest keeps the device loop from the user: worst gap, and `quit` answered.

Run: python -m tests.bench.loop_latency [--seconds N]

One guest of each kind against a real loop with a real control socket; nothing else runs. The
storms, by three vCPUs' threads each, are on a real VM of this host's KVM, with a device that has a
queue to serve and an interrupt to send with every turn.

`gap` is the longest time between two looks at the control socket and the timers. `cpu` is what of
it the loop's thread was on a processor: other work on the machine doesn't change that. `quit` is
the time until the command was answered in the middle of it. Prints, asserts nothing; the
goal is 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from kvm_bindings.x86_64 import System
from tests.support.control import FakeOperations
from tests.support.fake_memory import FakeMemory
from tests.support.real_memory import RealMemory
from tests.support.virtio_driver import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    Piece,
    VirtioPciDriver,
)
from tests.support.virtio_machine import DATA, VirtioMachine
from vmm.arch.x86_64.board import PcBoard
from vmm.control.control_socket import ControlSocket
from vmm.core.event_loop import EventLoop, drain
from vmm.core.ranges import Range
from vmm.devices.msix import CONTROL_ENABLE
from vmm.devices.virtio.balloon import INFLATE, VirtioBalloon
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.net import RX, TX, VirtioNet
from vmm.devices.virtio.net_backend import Passt
from vmm.devices.virtio.rng import VirtioRng
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory
from vmm.wiring.devices import Devices

RAM = 512 << 20
MIB = 1 << 20


class Ram(RealMemory):
    """Guest memory of its own."""

    def __init__(self) -> None:
        self.backing = MemfdBacking(RAM)
        self.guest = GuestMemory((Range(0, RAM),), self.backing)
        super().__init__(self.guest)

    def close(self) -> None:
        super().close()
        self.guest.close()


def table(machine: VirtioMachine, rows: list[tuple[int, int, int]]) -> Piece:
    """An indirect table in guest memory."""
    return machine.place(
        b"".join(
            struct.pack("<QIHH", gpa, size, flags | (DESC_NEXT if i + 1 < len(rows) else 0), i + 1)
            for i, (gpa, size, flags) in enumerate(rows)
        )
    )


def fill(machine: VirtioMachine, queue: int, rows: list[tuple[int, int, int]]) -> None:
    """The whole queue full of the same chain."""
    at = table(machine, rows)
    driver = machine.queues[queue]
    for i in range(driver.size):
        driver.descriptor(i, at.gpa, at.size, DESC_INDIRECT, 0)
    driver.offer(*range(driver.size))


def crumbs(flags: int, count: int = 1000) -> list[tuple[int, int, int]]:
    return [(64 * MIB + 2 * i, 1, flags) for i in range(count)]


def disk(folder: Path) -> VirtioBlock:
    path = folder / "disk"
    path.touch()
    os.truncate(path, 8 << 30)
    return VirtioBlock(open_disk(str(path)))


def cold_disk(folder: Path) -> VirtioBlock:
    """It begins with data that are read from the device, for which the kernel reads ahead as much
    as it may; then comes the hole."""
    device = disk(folder)
    for at in range(0, 64 * MIB, MIB):
        os.pwrite(device._disk.fd, os.urandom(MIB), at)
    os.fsync(device._disk.fd)
    os.posix_fadvise(device._disk.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return device


def request(kind: int, body: list[tuple[int, int, int]]) -> Callable[[VirtioMachine], int]:
    def arrange(machine: VirtioMachine) -> int:
        header = machine.place(struct.pack("<IIQ", kind, 0, 0))
        status = machine.room(1)
        fill(machine, 0, [(header.gpa, 16, 0), *body, (status, 1, DESC_WRITE)])
        return 0

    return arrange


def zeroes(machine: VirtioMachine) -> int:
    area = machine.place(struct.pack("<QII", 0, 1 << 16, 0))
    return request(13, [(area.gpa, 16, 0)])(machine)


def pages(machine: VirtioMachine) -> int:
    numbers = machine.place(struct.pack("<65000I", *range(2048, 2048 + 2 * 65000, 2)))
    fill(machine, INFLATE, [(numbers.gpa, numbers.size, 0)])
    return INFLATE


def every(queue: int, rows: list[tuple[int, int, int]]) -> Callable[[VirtioMachine], int]:
    def arrange(machine: VirtioMachine) -> int:
        fill(machine, queue, rows)
        return queue

    return arrange


def network(folder: Path) -> VirtioNet:
    ours, theirs = socket.socketpair()
    frame = struct.pack(">I", 60000) + bytes(60000)

    def feed() -> None:
        try:
            while True:
                theirs.sendall(frame)
        except OSError:
            theirs.close()

    threading.Thread(target=feed, daemon=True).start()
    return VirtioNet(Passt(ours), b"\2\0\0\0\0\1")


GUESTS: dict[str, tuple[Callable[[Path], VirtioDevice], Callable[[VirtioMachine], int]]] = {
    "balloon, 65,000 isolated pages a chain": (lambda folder: VirtioBalloon(), pages),
    "disk, reads of 4 GiB": (disk, request(0, [(64 * MIB, 4 * MIB, DESC_WRITE)] * 1000)),
    "disk, reads of 4 GiB, data first": (
        cold_disk, request(0, [(64 * MIB, 4 * MIB, DESC_WRITE)] * 1000)
    ),
    "disk, writes of 4 GiB": (disk, request(1, [(64 * MIB, 4 * MIB, 0)] * 1000)),
    "disk, zeroes of 32 MiB": (disk, zeroes),
    "disk, reads in pieces of a byte": (disk, request(0, crumbs(DESC_WRITE, 1024 - 2)[:512])),
    "disk, flushes": (disk, request(4, [])),
    "random numbers in pieces of a byte": (
        lambda folder: VirtioRng(), every(0, crumbs(DESC_WRITE))
    ),
    "random numbers, 64 KiB each": (
        lambda folder: VirtioRng(), every(0, [(64 * MIB, 1 << 16, DESC_WRITE)])
    ),
    "net, buffers in pieces of a byte": (
        network, every(RX, [(64 * MIB, 12, DESC_WRITE), *crumbs(DESC_WRITE)])
    ),
    "net, frames in pieces of a byte": (network, every(TX, crumbs(0))),
    "console, output in pieces of a byte": (
        lambda folder: open_console([f"file={folder / 'out'}"]), every(1, crumbs(0))
    ),
}  # fmt: skip


class OnKvm(VirtioMachine):
    """The device on a PC's board, connected to a VM of this host's KVM; it interrupts by MSI-X."""

    MESSAGE = 0xFEE0_0000
    VCPUS = 3

    def __init__(self, device: VirtioDevice, memory: FakeMemory, loop: EventLoop) -> None:
        guest = cast(Ram, memory).guest
        system = System()
        vm = system.create_vm(0)
        vm.create_irqchip()
        self._devices = Devices(
            vm, guest, loop, {"device": device}, PcBoard,
            output=lambda data: None, room=lambda: None,
            power_off=lambda: None, reset=lambda: None,
        )  # fmt: skip
        board = cast(PcBoard, self._devices.board)
        self.device, self.memory, self.rung, self.queues = device, memory, [], []
        self.ports, self.registers, self.pci = board.ports, board.registers, board.pci
        self.transport = self._devices._transports[0]
        self.driver = VirtioPciDriver(self.pci, self.ports, memory, 1)
        self._next = DATA
        self.accesses = 0
        self._ends = threading.Event()
        self._vcpus: list[threading.Thread] = []

    def up(self, features: int | None = None, size: int = 16, refuse: int = 0) -> None:
        super().up(features, size, refuse)
        driver = self.driver
        driver.set_config(0x04, 2, 0x7)
        at = driver.config(0x34, 1)
        while driver.config(at, 1) != 0x11:
            at = driver.config(at + 1, 1)
        driver.set_config(at + 2, 2, CONTROL_ENABLE)
        for vector in range(2):
            for offset, value in ((0, self.MESSAGE), (8, 0x41 + vector), (12, 0)):
                self.write_entry(vector, offset, value)
        driver.put(0x16, 2, 0)
        driver.put(0x1A, 2, 1)

    def write_entry(self, vector: int, offset: int, value: int) -> None:
        found = self.registers.find(self.driver.config(0x14, 4) + 16 * vector + offset)
        if found is not None:
            found[0].write(found[1], 4, value)

    def start(self, storm: Callable[[OnKvm, int], None]) -> None:
        """Each vCPU goes round and round with it."""

        def run(vcpu: int) -> None:
            while not self._ends.is_set():
                storm(self, vcpu)
                self.accesses += 1
                time.sleep(0)  # KVM_RUN, where nobody holds the GIL

        for vcpu in range(self.VCPUS):
            self._vcpus.append(threading.Thread(target=run, args=(vcpu,)))
            self._vcpus[-1].start()

    def close(self) -> None:
        self._ends.set()
        for vcpu in self._vcpus:
            vcpu.join()
        self._devices.close()
        self.device.close()
        self.memory.close()


def rewrite_entries(machine: OnKvm, vcpu: int) -> None:
    """The queue's own message, another one each time."""
    machine.write_entry(1, 8, 0x42 + machine.accesses % 64)


def toggle_masks(machine: OnKvm, vcpu: int) -> None:
    machine.write_entry(1, 12, 1)
    machine.write_entry(1, 8, 0x42 + machine.accesses % 64)
    machine.write_entry(1, 12, 0)


def move_bars(machine: OnKvm, vcpu: int) -> None:
    """The registers elsewhere, a notify there, decoding off and on."""
    driver, place = machine.driver, 0xD000 + 0x100 * (machine.accesses % 16)
    driver.set_config(0x10, 4, place | 1)
    machine.ports.write(place + 0x80, 2, 0)
    driver.set_config(0x04, 2, 0x4)
    driver.set_config(0x04, 2, 0x7)
    machine.ports.write(place + 0x80, 2, 0)


STORMS = {
    "storm: MSI-X entries rewritten": rewrite_entries,
    "storm: MSI-X entries masked, rewritten, unmasked": toggle_masks,
    "storm: BARs moved, decoding off and on": move_bars,
}
GUESTS |= dict.fromkeys(
    STORMS, (lambda folder: VirtioRng(), every(0, [(64 * MIB, 256, DESC_WRITE)]))
)


def measure(name: str, seconds: float) -> tuple[float, float, float]:
    """Longest gap, most work of the loop's thread in one, time until `quit` was answered."""
    make, arrange = GUESTS[name]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loop = EventLoop()
        stack.callback(loop.close)
        memory = cast(FakeMemory, Ram())
        machine = (
            OnKvm(make(folder), memory, loop)
            if name in STORMS
            else VirtioMachine(make(folder), memory=memory)
        )
        stack.callback(machine.close)
        machine.up(size=64)
        queue = arrange(machine)
        operations: Any = FakeOperations()
        operations.quit = loop.stop
        control = ControlSocket(str(folder / "c"))
        control.serve(loop, operations)
        stack.callback(control.close)
        bell = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, bell)
        worst = busiest = 0.0
        last, worked = time.monotonic(), 0.0

        def looked() -> None:
            nonlocal worst, last, busiest, worked
            now, work = time.monotonic(), time.thread_time()
            worst, last = max(worst, now - last), now
            busiest, worked = max(busiest, work - worked), work
            loop.set_timer(now, looked)

        def rung() -> None:
            drain(bell)
            machine.transport.notify(queue)
            driver = machine.queues[queue]
            done = (driver.used_index() - driver.seen) & 0xFFFF
            driver.seen = driver.used_index()
            driver.available = (driver.available + done) & 0xFFFF
            driver.set_available_index(driver.available)  # always full
            machine.rung.clear()
            os.eventfd_write(bell, 1)

        machine.device.watch = loop.watch
        loop.add(bell, rung)
        loop.set_timer(time.monotonic(), looked)
        answered: list[float] = []

        def ask() -> None:
            time.sleep(seconds)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(folder / "c"))
                started = time.monotonic()
                client.sendall(b'{"command": "quit"}\n')
                json.loads(client.recv(100))
                answered.append(time.monotonic() - started)

        if isinstance(machine, OnKvm):
            machine.start(STORMS[name])
        user = threading.Thread(target=ask)
        user.start()
        worked = time.thread_time()
        loop.run()
        user.join()
    return worst, busiest, answered[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a hostile guest does to the loop.")
    parser.add_argument("--seconds", type=float, default=1.0, help="before quit is asked for")
    parser.add_argument("--only", default="", metavar="TEXT", help="guests with that in the name")
    options = parser.parse_args()
    print(f"{'guest':50} {'gap ms':>8} {'cpu ms':>8} {'quit ms':>8}")
    for name in GUESTS:
        if options.only not in name:
            continue
        found = "".join(f"{value * 1000:9.1f}" for value in measure(name, options.seconds))
        print(f"{name:50}{found}", flush=True)


if __name__ == "__main__":
    main()
