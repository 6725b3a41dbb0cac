"""A batch of plain reads and writes of a disk, carried out together.

Requests that are neighbours on the disk and in memory become one transfer, all headers are read
by one call, all transfers of a direction made by another. What they are is worked out in C
(`kvm_bindings.virtqueue.DiskPlanner`). A request that is anything but a plain read or write, or
that can't be carried out, ends its batch. It is left to `VirtioBlock`, which serves one after the
other and answers each for itself. Nothing has reached the guest by then but data that it asked for.
"""

from __future__ import annotations

import time

from kvm_bindings.virtqueue import Chains, DiskPlanner, Plan
from vmm.core.disk_image import SECTOR
from vmm.core.errors import GuestMemoryError
from vmm.core.lean_typing import Protocol
from vmm.devices.virtio.block_file import ReadAhead
from vmm.devices.virtio.budget import Pace
from vmm.devices.virtio.queue import BatchMemory


class DiskMemory(BatchMemory, Protocol):
    """Guest memory that moves many pieces to or from a file at once; the bytes moved.

    `moves`: offset of the source, of the target, size, offset of the source...
    """

    def move_in(self, src_fd: int, moves: list[int]) -> int: ...

    def move_out(self, moves: list[int], dst_fd: int) -> int: ...


class Batch:
    """What came of the requests that were carried out: `elements` for the used ring, and where
    the status bytes go, as gpa, size, gpa, size..."""

    __slots__ = ("bytes_read", "bytes_written", "elements", "requests", "statuses")

    def __init__(self) -> None:
        self.requests = 0
        self.elements = b""
        self.statuses: list[int] = []
        self.bytes_read = 0
        self.bytes_written = 0

    def add(self, plan: Plan) -> None:
        """These were carried out, too."""
        self.requests += plan.requests
        self.elements += plan.elements
        self.statuses += plan.statuses
        self.bytes_read += plan.bytes_read
        self.bytes_written += plan.bytes_written


def serve_together(
    memory: DiskMemory,
    planner: DiskPlanner,
    chains: Chains,
    fd: int,
    sectors: int,
    *,
    may_write: bool,
    most: int,
    read_ahead: ReadAhead,
) -> Plan | None:
    """Carry out the first of the chains, as many as are plain and don't cost more than `most`
    (see Pace); None where that are none, or something is in their way. `read_ahead` is told of
    reads.

    The data has been moved then. What is left to the caller are status bytes, used ring, and
    `planner.done`.
    """
    try:
        pieces = planner.headers(chains)
        if not pieces:
            return None
        headers = memory.read_many(pieces)
        plan = planner.plan(chains, headers, sectors * SECTOR, may_write, Pace.EACH, most)
        if not plan.requests:
            return None
        if plan.reads and not _read(memory, fd, plan.reads, plan.bytes_read, read_ahead):
            return None
        if plan.writes and not _write(memory, plan.writes, plan.bytes_written, fd):
            return None
    except (GuestMemoryError, OSError):
        return None
    return plan


def _read(memory: DiskMemory, fd: int, moves: list[int], left: int, read_ahead: ReadAhead) -> bool:
    """Carry out reads of `left` bytes; False where the file ends. Who moves stops where the host
    is slow, so that something can be done about it."""
    while True:
        started = time.monotonic()
        moved = memory.move_in(fd, moves)
        left -= moved
        rest = after(moves, moved) if left else []
        if read_ahead.is_due(time.monotonic() - started, moved):
            read_ahead.look(rest[0] if rest else moves[-3] + moves[-1])
        if not (left and moved):
            return not left
        moves = rest


def _write(memory: DiskMemory, moves: list[int], left: int, fd: int) -> bool:
    """As `_read`."""
    while True:
        moved = memory.move_out(moves, fd)
        left -= moved
        if not (left and moved):
            return not left
        moves = after(moves, moved)


def after(moves: list[int], moved: int) -> list[int]:
    """What is left of moves (source, target, size, source...) when so many bytes have moved."""
    at = 0
    while moved >= moves[at + 2]:
        moved -= moves[at + 2]
        at += 3
    source, target, size = moves[at : at + 3]
    return [source + moved, target + moved, size - moved, *moves[at + 3 :]]
