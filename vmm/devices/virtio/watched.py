"""Guest memory and queues of a device whose every access is announced before it happens.

Only runs that want it have this between a device and its memory; the others pay nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
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
                if _cover(queue.rings(is_write), gpa, size):
                    return RING
            buffers = [buffer for queue in self._queues for buffer in queue.buffers(is_write)]
        return DESCRIPTOR if _cover(buffers, gpa, size) else None


class WatchedQueue(SplitQueue):
    """A queue that remembers what it has named to the device."""

    __slots__ = ("__weakref__", "_held", "_rings", "_watch")

    def __init__(
        self, watch: WatchedMemory, size: int, desc: int, avail: int, used: int, features: int
    ) -> None:
        super().__init__(_RingMemory(watch), size, desc, avail, used, features)
        self._watch = watch
        self._held: dict[int, Chain] = {}
        # With the event indexes at the rings' ends (2.7.10), which are there in any case.
        self._rings = {
            False: ((desc, 16 * size), (avail, 6 + 2 * size)),
            True: ((used, 6 + 8 * size),),
        }

    def rings(self, is_write: bool) -> Iterable[Segment]:
        return self._rings[is_write]

    def buffers(self, is_write: bool) -> Iterable[Segment]:
        """Those of the requests that the device holds; the watch's lock is held."""
        for chain in self._held.values():
            yield from chain.writable if is_write else chain.readable

    def take(self, most: int = MAX_QUEUE_SIZE) -> list[Chain]:
        chains = super().take(most)
        with self._watch.lock:
            self._held.update((chain.head, chain) for chain in chains)
        return chains

    def put_back(self, count: int) -> None:
        super().put_back(count)
        with self._watch.lock:
            for head in list(self._held)[len(self._held) - count :]:
                del self._held[head]

    def publish(
        self, used: list[tuple[int, int]], before: Sequence[int] = (), data: bytes = b""
    ) -> bool:
        try:
            return super().publish(used, before, data)
        finally:
            with self._watch.lock:
                for head, _ in used:
                    self._held.pop(head, None)


class _RingMemory:
    """What a queue itself reads and writes: its rings, and tables that descriptors name."""

    def __init__(self, watch: WatchedMemory) -> None:
        self._watch = watch

    def pread(self, size: int, gpa: int) -> bytes:
        self._watch.touch(gpa, size, False, otherwise=DESCRIPTOR)
        return self._watch._memory.pread(size, gpa)

    def pwrite(self, data: bytes, gpa: int) -> None:
        self._watch.pwrite(data, gpa)


def _cover(segments: Iterable[Segment], gpa: int, size: int) -> bool:
    """Whether `segments` together contain every byte: a device joins neighbours."""
    at, end = gpa, gpa + size
    for start, length in sorted(segments):
        if start > at:
            return False
        at = max(at, start + length)
        if at >= end:
            return True
    return False
