"""A batch of plain reads and writes of a disk, carried out together.

Requests that are neighbours on the disk and in memory become one transfer, all headers are read
by one call, all transfers of a direction made by another. A request that is anything but a plain
read or write, or that can't be carried out, leaves its batch to `VirtioBlock`, which serves one
after the other and answers each for itself; nothing has reached the guest by then but data that
it asked for.
"""

from __future__ import annotations

import struct

from vmm.core.disk_image import SECTOR
from vmm.core.errors import GuestMemoryError
from vmm.core.lean_typing import NamedTuple, Protocol
from vmm.devices.virtio.budget import Pace
from vmm.devices.virtio.queue import BatchMemory, Chain
from vmm.devices.virtio.segments import total

_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_IN, _OUT = 0, 1  # VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT


class DiskMemory(BatchMemory, Protocol):
    """Guest memory that moves many pieces to or from a file at once; the bytes moved.

    `moves`: offset of the source, of the target, size, offset of the source...
    """

    def move_in(self, src_fd: int, moves: list[int]) -> int: ...

    def move_out(self, moves: list[int], dst_fd: int) -> int: ...


class Batch(NamedTuple):
    """What came of the first `len(used)` chains: `used` for the ring, and where the status
    bytes go, as gpa, size, gpa, size..."""

    used: list[tuple[int, int]]
    statuses: list[int]
    bytes_read: int
    bytes_written: int
    cost: int

    def plus(self, more: Batch) -> Batch:
        """The requests of both, in this order."""
        return Batch(
            self.used + more.used,
            self.statuses + more.statuses,
            self.bytes_read + more.bytes_read,
            self.bytes_written + more.bytes_written,
            self.cost + more.cost,
        )


class _Moves:
    """Pieces of data, neighbours joined: lists of disk position, gpa and size."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.gpas: list[int] = []
        self.sizes: list[int] = []
        # Where the next piece would be a neighbour on both sides.
        self.position = self.gpa = -1
        self.total = 0

    def triples(self, sources: list[int], targets: list[int]) -> list[int]:
        moves = [0] * (3 * len(self.sizes))
        moves[::3], moves[1::3], moves[2::3] = sources, targets, self.sizes
        return moves


def serve_together(
    memory: DiskMemory,
    chains: list[Chain],
    fd: int,
    sectors: int,
    *,
    may_write: bool,
    most: int,
) -> Batch | None:
    """Carry out the chains, or as many as don't cost more than `most` (see Pace); None where that
    can't be done.

    The data has been moved then, the status bytes are to be written by the caller.
    """
    headers = _header_pieces(chains)
    if headers is None:
        return None
    try:
        data = memory.read_many(headers)
        reads, writes = _Moves(), _Moves()
        used: list[tuple[int, int]] = []
        statuses: list[int] = []
        cost = 0
        each, limit = Pace.EACH, sectors * SECTOR
        for (head, readable, writable), (kind, _, sector) in zip(
            chains, _HEADER.iter_unpack(data), strict=True
        ):
            if kind == _IN and len(readable) == 1:
                moves, segments = reads, writable[:-1]
            elif kind == _OUT and len(writable) == 1 and may_write:
                moves, segments = writes, readable[1:]
            else:
                return None
            start = position = sector * SECTOR
            size = segments[0][1] if len(segments) == 1 else total(segments)
            end = start + size
            if end % SECTOR or end > limit:
                return None
            if cost + each + size > most:
                if not used:
                    return None  # it takes steps
                break
            cost += each + size
            moves.total += size
            for gpa, length in segments:
                if moves.position == position and moves.gpa == gpa:
                    moves.sizes[-1] += length
                else:
                    moves.positions.append(position)
                    moves.gpas.append(gpa)
                    moves.sizes.append(length)
                position += length
                moves.position, moves.gpa = position, gpa + length
            used.append((head, position - start + 1 if kind == _IN else 1))
            statuses += (writable[-1][0], 1)
        if reads.sizes:
            triples = reads.triples(reads.positions, reads.gpas)
            if memory.move_in(fd, triples) != reads.total:
                return None
        if writes.sizes:
            triples = writes.triples(writes.gpas, writes.positions)
            if memory.move_out(triples, fd) != writes.total:
                return None
    except (GuestMemoryError, OSError):
        return None
    return Batch(used, statuses, reads.total, writes.total, cost)


def _header_pieces(chains: list[Chain]) -> list[int] | None:
    """Where the headers are, if all chains are cut the usual way: header, data, status byte."""
    pieces: list[int] = []
    for _, readable, writable in chains:
        if not readable or readable[0][1] != 16 or not writable or writable[-1][1] != 1:
            return None
        pieces += readable[0]
    return pieces
