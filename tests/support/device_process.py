"""A machine whose disk's process is played by the test, message by message, or is a real one."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from kvm_bindings import fdops
from tests.support.fake_memory import BatchingFakeMemory, FakeMemory
from tests.support.virtio_driver import Piece
from tests.support.virtio_machine import MEMORY, VirtioMachine
from vmm.core.disk_image import SECTOR
from vmm.devices.process import protocol
from vmm.devices.process.front_end import MovedFile, ProcessDevice, Processes
from vmm.devices.process.protocol import HEAD
from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio.block import F_FLUSH, T_IN, T_OUT, VirtioBlock
from vmm.devices.virtio.block_file import open_disk
from vmm.machine.device_processes import DISK_PATIENCE

SECTORS = 512
READY = HEAD.pack(protocol.DONE, 1, 7, 0)
"""What a process says first."""


class ByHand:
    """Processes that are the test's: `far` is the other end of the last one's socket."""

    def __init__(self) -> None:
        self.far: socket.socket | None = None
        self.started = self.ended = 0

    def start(self, number: int) -> tuple[socket.socket, int]:
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.far.settimeout(10)
        self.started += 1
        return near, 1000 + self.started

    def end(self, number: int) -> str:
        if self.far is not None:
            self.far.close()
            self.far = None
        self.ended += 1
        return "was killed by SIGKILL"

    def close(self) -> None:
        self.end(0)


class DiskRig:
    """A machine with one disk of SECTORS, each full of its number's bytes."""

    def __init__(
        self,
        folder: Path,
        processes: ByHand | Spawner,
        options: str = "",
        *,
        batching: bool = True,
        fails_requests: bool = True,
    ) -> None:
        self.path = folder / "disk.img"
        self.path.write_bytes(b"".join(bytes([n & 0xFF]) * SECTOR for n in range(SECTORS)))
        disk = open_disk(f"{self.path},process{options}")
        self.fd = disk.fd
        block = VirtioBlock(disk, fdops.punch_hole, DISK_PATIENCE)
        if isinstance(processes, Spawner):
            processes.add(
                Job(block, [disk.fd], [disk.fd], lambda features: bool(features & F_FLUSH))
            )
            processes.begin()
        self.processes = processes
        self.timers: list[tuple[float, Callable[[], None]]] = []
        starts: Processes = processes
        moved = MovedFile(disk.fd, SECTORS * SECTOR, disk.read_only)
        self.device = ProcessDevice(
            block, "blk0", 0, starts, [moved], fails_requests=fails_requests
        )
        self.device.set_timer = lambda when, what: self.timers.append((when, what))
        self.memory = (BatchingFakeMemory if batching else FakeMemory)(MEMORY)
        self.machine = VirtioMachine(self.device, self.memory)

    def close(self) -> None:
        self.machine.close()
        self.processes.close()

    def request(self, kind: int, sector: int, *data: Piece) -> Piece:
        """Offer a request, without a notify; where its status byte is."""
        header = self.machine.place(struct.pack("<IIQ", kind, 0, sector))
        status = self.machine.blank(1)
        self.machine.give(0, header, *data, status)
        return status

    def read(self, sector: int, size: int = SECTOR) -> tuple[Piece, Piece]:
        data = self.machine.blank(size)
        return data, self.request(T_IN, sector, data)

    def write(self, sector: int, data: bytes) -> Piece:
        return self.request(T_OUT, sector, self.machine.place(data))

    def status(self, piece: Piece) -> int:
        """0xCC as long as there is none."""
        return self.machine.text(piece, 1)[0]

    def serve(self) -> None:
        """Notify, and let all that is there come to rest."""
        self.machine.kick(0)

    def until(self, done: Callable[[], bool]) -> None:
        """Serve what comes until it is so; a real process takes its time."""
        for _ in range(1000):
            self.machine.settle()
            if done():
                return
            assert self.machine.loop.wait(10), "the process says nothing"
        raise AssertionError("it never comes to be so")

    def disk(self) -> bytes:
        return os.pread(self.fd, SECTORS * SECTOR, 0)

    # --- a process by hand ---

    @property
    def far(self) -> socket.socket:
        assert isinstance(self.processes, ByHand) and self.processes.far is not None
        return self.processes.far

    def say(self, what: int, flags: int = 0, queue: int = 0, body: bytes = b"") -> None:
        self.raw(HEAD.pack(what, flags, queue, self.generation) + body)

    def raw(self, packet: bytes) -> None:
        self.far.send(packet)
        self.machine.settle()

    def hear(self) -> tuple[int, int, int, bytes]:
        """What the process is told next: what, flags, queue, body."""
        packet = self.far.recv(protocol.LONGEST)
        what, flags, queue, self.generation = HEAD.unpack_from(packet)
        return what, flags, queue, packet[HEAD.size :]

    def ask(self, what: int, body: bytes, flags: int = 0, queue: int = 0) -> tuple[int, bytes]:
        """An access: the status and what comes with it."""
        self.say(what, flags, queue, body)
        answer, status, _, found = self.hear()
        assert answer == protocol.ANSWER
        return status, found

    def up_by_hand(self) -> None:
        """The driver is up, and the process knows of it."""
        self.generation = 0
        self.raw(READY)
        self.machine.up()
        while self.hear()[0] != protocol.ACTIVATE:
            self.say(protocol.DONE)
        self.say(protocol.DONE)
