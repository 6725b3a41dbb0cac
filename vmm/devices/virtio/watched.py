"""Guest memory and queues of a device whose every access is announced before it happens.

Only runs that want it have this between a device and its memory; the others pay nothing.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from weakref import WeakSet

from vmm.core.ranges import Range
from vmm.devices.virtio.device import GuestMemory
from vmm.devices.virtio.queue import MAX_QUEUE_SIZE, Chain, Segment, SplitQueue

RING, DESCRIPTOR = "ring", "descriptor"

Announce = Callable[[Range, bool, str | None], None]
"""Told the range, whether the device writes there, and what names it; refuses by raising a
GuestMemoryError."""


class WatchedMemory:
    """One device's memory; `queue` makes the queues that it serves.

    What names a range is worked out from what the queues say, apart from the device's own code:
    the rings where the driver put them, and the buffers of requests from `take` to `publish`.
    """

    def __init__(self, memory: GuestMemory, announce: Announce) -> None:
        self._memory = memory
        self._announce = announce
        # Weak: a reset drops a device's queues, and what they named is named no longer.
        self._queues: WeakSet[WatchedQueue] = WeakSet()
        self.lock = threading.Lock()

    def pread(self, size: int, gpa: int) -> bytes:
        self.touch(gpa, size, False)
        return self._memory.pread(size, gpa)

    def pwrite(self, data: bytes | memoryview, gpa: int) -> None:
        self.touch(gpa, memoryview(data).nbytes, True)
        self._memory.pwrite(data, gpa)

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        self.touch(gpa, size, True)
        return self._memory.transfer_in(src_fd, src_offset, gpa, size)

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        self.touch(gpa, size, False)
        return self._memory.transfer_out(gpa, size, dst_fd, dst_offset)

    def discard(self, gpa: int, size: int) -> None:
        """No access: nothing is read, and what is lost is what the guest gives up."""
        self._memory.discard(gpa, size)

    def queue(
        self, memory: object, size: int, desc: int, avail: int, used: int, features: int = 0
    ) -> WatchedQueue:
        """In the place of SplitQueue; `memory` is this one."""
        queue = WatchedQueue(self, size, desc, avail, used, features)
        self._queues.add(queue)
        return queue

    def touch(self, gpa: int, size: int, is_write: bool, otherwise: str | None = None) -> None:
        """Announce an access, to be called before it; `otherwise` names what nothing else does."""
        if size > 0:
            self._announce(
                Range(gpa, size), is_write, self._named(gpa, size, is_write) or otherwise
            )

    def _named(self, gpa: int, size: int, is_write: bool) -> str | None:
        with self.lock:
            for queue in self._queues:
                if queue.ring_holds(gpa, size, is_write):
                    return RING
            if any(queue.request_holds(gpa, size, is_write) for queue in self._queues):
                return DESCRIPTOR
        return None


class WatchedQueue(SplitQueue):
    """A queue that remembers what it has named to the device.

    A device deals with one request after the other, and joins neighbours within one at most: what
    the last access belonged to is asked first, by bisection.
    """

    __slots__ = ("__weakref__", "_held", "_last", "_rings", "_watch")

    def __init__(
        self, watch: WatchedMemory, size: int, desc: int, avail: int, used: int, features: int
    ) -> None:
        super().__init__(_RingMemory(watch), size, desc, avail, used, features)
        self._watch = watch
        self._held: dict[int, _Request] = {}
        self._last: _Request | None = None
        # With the event indexes at the rings' ends (2.7.10), which are there in any case.
        self._rings = {
            False: ((desc, 16 * size), (avail, 6 + 2 * size)),
            True: ((used, 6 + 8 * size),),
        }

    # --- the watch's lock is held in these two ---

    def ring_holds(self, gpa: int, size: int, is_write: bool) -> bool:
        """Whether the range is the driver's word for a ring that is read, or written."""
        for start, length in self._rings[is_write]:
            if start <= gpa and gpa + size <= start + length:
                return True
        return False

    def request_holds(self, gpa: int, size: int, is_write: bool) -> bool:
        """Whether the range is in the buffers of one request that the device holds."""
        if self._last is not None and self._last.covers(gpa, size, is_write):
            return True
        for request in self._held.values():
            if request.covers(gpa, size, is_write):
                self._last = request
                return True
        return False

    def take(self, most: int = MAX_QUEUE_SIZE) -> list[Chain]:
        chains = super().take(most)
        with self._watch.lock:
            self._held.update((chain.head, _Request(chain)) for chain in chains)
        return chains

    def put_back(self, count: int) -> None:
        super().put_back(count)
        with self._watch.lock:
            for head in list(self._held)[len(self._held) - count :]:
                self._forget(head)

    def publish(
        self, used: list[tuple[int, int]], before: Sequence[int] = (), data: bytes = b""
    ) -> bool:
        try:
            return super().publish(used, before, data)
        finally:
            with self._watch.lock:
                for head, _ in used:
                    self._forget(head)

    def _forget(self, head: int) -> None:
        request = self._held.pop(head, None)
        if request is self._last:
            self._last = None


class _Request:
    """One request's buffers; put in order when the first of them is asked for."""

    __slots__ = ("_chain", "_covers")

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._covers: list[tuple[list[int], list[int]] | None] = [None, None]

    def covers(self, gpa: int, size: int, is_write: bool) -> bool:
        """Whether every byte is in the buffers that the device may write, or read."""
        cover = self._covers[is_write]
        if cover is None:
            chain = self._chain
            cover = self._covers[is_write] = _joined(chain.writable if is_write else chain.readable)
        starts, ends = cover
        at = bisect_right(starts, gpa) - 1
        return at >= 0 and gpa + size <= ends[at]


class _RingMemory:
    """What a queue itself reads and writes: its rings, and tables that descriptors name."""

    def __init__(self, watch: WatchedMemory) -> None:
        self._watch = watch

    def pread(self, size: int, gpa: int) -> bytes:
        self._watch.touch(gpa, size, False, otherwise=DESCRIPTOR)
        return self._watch._memory.pread(size, gpa)

    def pwrite(self, data: bytes, gpa: int) -> None:
        self._watch.pwrite(data, gpa)


def _joined(segments: list[Segment]) -> tuple[list[int], list[int]]:
    """Starts and ends of what `segments` cover, in order, with neighbours joined."""
    starts: list[int] = []
    ends: list[int] = []
    for start, length in sorted(segments):
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], start + length)
        else:
            starts.append(start)
            ends.append(start + length)
    return starts, ends
