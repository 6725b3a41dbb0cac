"""The rings of a queue that another process serves, and what to make of them when it is gone."""

from __future__ import annotations

import struct

from vmm.devices.virtio.queue import Chain, QueueError, RingMemory, SplitQueue


class ForeignQueue(SplitQueue):
    """A queue as the guest's driver set it up: its addresses for the back end, and, once that is
    gone, a queue like any other from where the back end has left it."""

    __slots__ = ()

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where the guest has descriptor table, available ring and used ring."""
        return self._desc, self._avail, self._used

    @property
    def next_available(self) -> int:
        """Where a back end is to begin."""
        return self._next_avail

    def require_shared(self, memory: RingMemory) -> None:
        """Raises GuestMemoryError where a byte of the rings isn't shared guest memory."""
        desc, avail, used = self.addresses
        for gpa, size in (
            (desc, 16 * self.size),
            (avail, 6 + 2 * self.size),
            (used, 6 + 8 * self.size),
        ):
            memory.pread(size, gpa)

    def take_over(self) -> list[Chain]:
        """The requests that the back end took and did not return, in the driver's order; `publish`
        returns them, and `take` goes on after them.

        Both rings are other people's words: what doesn't add up raises QueueError, GuestMemoryError
        what isn't shared memory any more.
        """
        size = self.size
        desc, avail, used = self.addresses
        data = self._memory.pread(4 + 2 * size, avail)
        available = struct.unpack(f"<HH{size}H", data)
        data = self._memory.pread(4 + 8 * size, used)
        returned = struct.unpack(f"<HH{2 * size}I", data)
        count = (available[1] - returned[1]) & 0xFFFF
        if count > size:
            raise QueueError(
                f"the used ring's index is {returned[1]}, the available ring's {available[1]}, "
                f"the queue has {size} entries"
            )
        heads = unreturned(size, available[1], available[2:], returned[1], returned[2::2])
        if len(heads) != count:
            raise QueueError(
                f"{count} requests are the back end's, and the rings don't say which: it didn't "
                "return them in their order"
            )
        table = self._memory.pread(16 * size, desc)
        chains = [self._chain(table, head)[0] for head in heads]
        self._next_avail, self._next_used = available[1], returned[1]
        return chains


def unreturned(
    size: int,
    available_index: int,
    available: tuple[int, ...],
    used_index: int,
    used: tuple[int, ...],
) -> list[int]:
    """The heads that may have been made available and not returned since, oldest first.

    The rings hold what the last `size` times had, by the slot. What was returned at the n-th time
    had been made available at the latest at the time n + size. So a head whose last time among the
    available lies at or before its last time among the returned is not outstanding, and all others
    may be. Where they are as many as the indexes say, they are taken to be: a back end that keeps
    the driver's order leaves no more, one that doesn't may leave more. (It could leave as many and
    others: where a request waited while a whole round of the ring came and went, and a later one
    was returned out of its order. Then the driver finds one answered that it doesn't wait for.)
    """
    # What was never written holds zeros, as returned at times before the ring's first.
    last_used: dict[int, int] = {}
    for time in range(used_index - size, used_index):
        last_used[used[time % size]] = time
    # The same count of times for both: the used ring's.
    ahead = (available_index - used_index) & 0xFFFF
    last_available: dict[int, int] = {}
    for time in range(used_index + ahead - size, used_index + ahead):
        head = available[time % size]
        if head < size:
            last_available[head] = time
    found = [
        (time, head)
        for head, time in last_available.items()
        if head not in last_used or time > last_used[head]
    ]
    return [head for time, head in sorted(found)]
