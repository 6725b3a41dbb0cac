"""Frames that a network card reads from guest memory together, or writes to it together: many
pieces by one call, where the memory takes batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmm.core.errors import GuestMemoryError
from vmm.devices.virtio.device import GuestMemory
from vmm.devices.virtio.queue import Chain
from vmm.devices.virtio.segments import gather, merged, total

AT_ONCE = 64 << 10
"""Bytes of frames that are read, or written, together; a larger one goes alone."""
_MOST_NUMBERS = 1024
"""Of pieces that are read together, two each."""

Frame = tuple[list[Chain], bytes]
"""One that has arrived, with the buffers that it goes to."""


class Arrived:
    """Frames that have buffers, and are written and returned together."""

    __slots__ = ("any_yet", "frames", "size")

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.size = 0
        self.any_yet = False
        """Whether there has been one in this turn."""

    def add(self, chains: list[Chain], frame: bytes) -> None:
        self.frames.append((chains, frame))
        self.size += len(frame)
        self.any_yet = True

    def take(self) -> list[Frame]:
        frames, self.frames, self.size = self.frames, [], 0
        return frames


def spread(
    chains: list[Chain], size: int, pieces: list[int] | None = None
) -> list[tuple[int, int]]:
    """What of `size` bytes goes to each of the chains, for the used ring; added to `pieces` (gpa,
    size, gpa...), where exactly."""
    used = []
    for chain in chains:
        written = 0
        for gpa, length in chain.writable:
            part = min(length, size - written)
            if not part:
                break
            if pieces is not None:
                pieces += (gpa, part)
            written += part
        used.append((chain.head, written))
        size -= written
    return used


def read_together(
    memory: GuestMemory, chains: list[Chain], is_frame: Callable[[int], bool]
) -> Iterator[tuple[Chain, bytes | memoryview | None]]:
    """Each chain with what is in it, read when the first of those is asked for that are read
    together; None for what is no frame by its size. Raises GuestMemoryError at the chain that is
    refused."""
    at = 0
    while at < len(chains):
        pieces, sizes = _group(chains, at, is_frame)
        data = _read(memory, pieces)
        done = 0
        for chain, size in zip(chains[at : at + len(sizes)], sizes, strict=True):
            if not size:
                yield chain, None
            elif data is None:
                yield chain, gather(memory, chain.readable)
            else:
                yield chain, data[done : done + size]
            done += size
        at += len(sizes)


def _group(
    chains: list[Chain], at: int, is_frame: Callable[[int], bool]
) -> tuple[list[int], list[int]]:
    """Of the chains from that one on that are read together: their pieces (gpa, size, gpa...), and
    how many bytes of each are read, none of what is no frame."""
    pieces: list[int] = []
    sizes: list[int] = []
    left = AT_ONCE
    for chain in chains[at:]:
        size = total(chain.readable)
        if not is_frame(size):
            size = 0
        elif sizes and (size > left or len(pieces) + 2 * len(chain.readable) > _MOST_NUMBERS):
            break
        else:
            left -= size
            for segment in merged(chain.readable):
                pieces += segment
        sizes.append(size)
    return pieces, sizes


def _read(memory: GuestMemory, pieces: list[int]) -> memoryview | None:
    """None where it is no more than one piece, the memory takes no batches, or something in it is
    refused: that one has to be found."""
    read_many = getattr(memory, "read_many", None)
    if read_many is None or len(pieces) < 4:
        return None
    try:
        return memoryview(read_many(pieces))
    except GuestMemoryError:
        return None
