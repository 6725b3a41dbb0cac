"""Fuzz target: what a device's process says to pyvmm."""

from __future__ import annotations

import io
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr

from tests.fuzz.targets.registry import target
from tests.support.device_process import READY
from tests.support.fake_memory import BatchingFakeMemory
from tests.support.virtio_machine import MEMORY, RINGS, VirtioMachine
from vmm.core.ranges import Range
from vmm.devices.process import protocol
from vmm.devices.process.front_end import MovedFile, ProcessDevice
from vmm.devices.process.protocol import COUNTS, HEAD, WRITE_HEAD, words
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import DiskFile

_DISK = 8 << 10
_SECRET = Range(0x9000, 0x1000)
_FRAME = struct.Struct("<BBBBH")
"""What, flags, queue, whether it is stale, bytes that follow."""


class _Played:
    """Processes of which the input is the other end."""

    def __init__(self) -> None:
        self.far: list[socket.socket] = []

    def start(self, number: int) -> tuple[socket.socket, int]:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far.setblocking(False)
        self.far.append(far)
        return near, 7

    def end(self, number: int) -> str:
        while self.far:
            self.far.pop().close()
        return "has ended"


def _frame(what: int, body: bytes = b"", flags: int = 0, queue: int = 0, stale: int = 0) -> bytes:
    return _FRAME.pack(what, flags, queue, stale, len(body)) + body


def _conversations() -> Iterator[bytes]:
    read = _frame(protocol.READ, words((RINGS, 4, 0x8000, 16)))
    moves, pieces, after = (0, 0x10000, 512), (0x8000, 1, RINGS, 2), (RINGS, 4)
    body = WRITE_HEAD.pack(1, 2, 1) + words((*moves, *pieces, *after)) + b"abc"
    counts = COUNTS.pack(1, 0, 0)
    turn = _frame(protocol.TURN, counts, protocol.INTERRUPT | protocol.RESTED)
    yield read + _frame(protocol.WRITE, body) + turn
    yield _frame(protocol.MOVE_IN, words(moves), protocol.WHOLE) + read + turn + turn
    yield _frame(protocol.MOVE_OUT, words((0x10000, 0, 512, 0x10200, 512, 512))) + turn
    yield _frame(protocol.READ, words((0x8FFF, 2)), stale=1) + _frame(protocol.READ, words((0, 1)))
    yield _frame(protocol.STOPPED, b"broken", protocol.REFUSED) + read
    yield _frame(protocol.CONFIG, bytes(60)) + _frame(protocol.DONE)


@target("device-process", _conversations, longest=700)
def device_process(data: bytes) -> None:
    """Packets of a disk's process, each behind its head and length. Private memory is neither read
    nor written, the disk keeps its length, nothing is answered but what was asked, and no exception
    leaves but the end of that process."""
    fd = os.memfd_create("fuzz-disk")
    os.truncate(fd, _DISK)
    played = _Played()
    block = VirtioBlock(DiskFile(fd, "disk", _DISK // 512, False, b""))
    moved = [MovedFile(fd, _DISK, False)]
    device = ProcessDevice(block, "blk0", 0, played, moved, fails_requests=True)
    device.set_timer = lambda when, what: None
    memory = BatchingFakeMemory(MEMORY)
    memory.poke(b"\xa5" * _SECRET.size, _SECRET.start)
    memory.private.append(_SECRET)
    machine = VirtioMachine(device, memory)
    try:
        (far,) = played.far
        far.send(READY)
        machine.settle()
        machine.up()
        machine.kick(0)
        (generation,) = struct.unpack_from("=I", far.recv(protocol.LONGEST), 4)
        far.send(HEAD.pack(protocol.DONE, 0, 0, generation))
        machine.settle()
        _drained(far)
        with redirect_stderr(io.StringIO()):  # what is told of each process that is ended
            _talk(data, generation, played, machine)
        assert "had pyvmm fail" not in str(device.statistics.last_end)
        assert memory.peek(_SECRET.size, _SECRET.start) == b"\xa5" * _SECRET.size
        assert os.fstat(fd).st_size == _DISK
    finally:
        machine.close()
        played.end(0)


def _talk(data: bytes, generation: int, played: _Played, machine: VirtioMachine) -> None:
    asked: Callable[[int], bool] = range(protocol.READ, protocol.MOVE_OUT + 1).__contains__
    at = 0
    while at + _FRAME.size <= len(data) and played.far:
        what, flags, queue, stale, size = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        body, at = data[at : at + size], at + size
        (far,) = played.far
        number = (generation - (stale & 1)) & 0xFFFF_FFFF
        far.send(HEAD.pack(what, flags, queue, number) + body)
        machine.settle()
        if not played.far:
            return
        answers = [each for each in _drained(far) if each[0] == protocol.ANSWER]
        assert len(answers) == asked(what), (what, answers)
        for answer in answers:
            assert b"\xa5\xa5\xa5\xa5" not in answer
            assert not (stale & 1) or answer[1] == protocol.STALE


def _drained(far: socket.socket) -> list[bytes]:
    found: list[bytes] = []
    while True:
        try:
            packet = far.recv(protocol.LONGEST)
        except BlockingIOError:
            return found
        if not packet:
            return found
        found.append(packet)
