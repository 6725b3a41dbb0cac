"""Bytes of a chain's segments: gathered from guest memory, or scattered over it.

All that a driver cuts into pieces (2.7.4 lets it cut anywhere) goes through here, one system
call for each piece that isn't its neighbour's continuation.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmm.devices.virtio.device import GuestMemory
from vmm.devices.virtio.queue import QueueError, Segment


def total(segments: list[Segment]) -> int:
    """How many bytes the segments are."""
    return sum([size for _, size in segments])


def merged(segments: list[Segment]) -> list[Segment]:
    """The same bytes in the same order, with neighbours in memory joined."""
    if len(segments) < 2:
        return segments
    joined = []
    start, end = segments[0][0], segments[0][0]
    for gpa, size in segments:
        if gpa != end:
            joined.append((start, end - start))
            start = gpa
        end = gpa + size
    joined.append((start, end - start))
    return joined


def gather(memory: GuestMemory, segments: list[Segment]) -> bytes:
    """All bytes of the segments."""
    if len(segments) == 1:
        return memory.pread(segments[0][1], segments[0][0])
    return b"".join([memory.pread(size, gpa) for gpa, size in merged(segments)])


def scatter(memory: GuestMemory, segments: list[Segment], data: bytes | memoryview) -> int:
    """Write `data` over the segments from their start; the bytes that found room."""
    view = memoryview(data)
    done = 0
    for gpa, size in segments:
        piece = view[done : done + size]
        if not piece:
            break
        memory.pwrite(piece, gpa)
        done += len(piece)
    return done


def take_front(segments: list[Segment], count: int) -> tuple[list[Segment], list[Segment]]:
    """Split the first `count` bytes off. QueueError when there are not so many."""
    if segments and segments[0][1] == count:
        return segments[:1], segments[1:]
    front: list[Segment] = []
    wanted = count
    for index, (gpa, size) in enumerate(segments):
        piece = min(size, count)
        front.append((gpa, piece))
        count -= piece
        if count == 0:
            rest = segments[index + 1 :]
            return front, [(gpa + piece, size - piece), *rest] if size > piece else rest
    raise QueueError(f"a request is shorter than its header of {wanted} bytes")


def first(segments: list[Segment], count: int) -> list[Segment]:
    """The segments of at most the first `count` bytes."""
    if segments and segments[0][1] >= count:
        return [(segments[0][0], count)] if count > 0 else []
    taken: list[Segment] = []
    for gpa, size in segments:
        if count <= 0:
            break
        taken.append((gpa, min(size, count)))
        count -= size
    return taken


def cut(segments: list[Segment], size: int) -> Iterator[list[Segment]]:
    """The same bytes, `size` at a time (the last piece may be shorter)."""
    piece: list[Segment] = []
    room = size
    for gpa, length in segments:
        done = 0
        while done < length:
            part = min(length - done, room)
            piece.append((gpa + done, part))
            done += part
            room -= part
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def aligned_pieces(start: int, size: int, most: int) -> Iterator[tuple[int, int]]:
    """[start, start + size) as (start, size) in pieces that end at multiples of `most`, a power
    of two."""
    end = start + size
    while start < end:
        stop = min(end, (start | (most - 1)) + 1)
        yield start, stop - start
        start = stop
