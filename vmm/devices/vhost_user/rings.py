"""The rings of a queue that another process serves, and what to make of them when it is gone."""

from __future__ import annotations

import struct

from vmm.devices.virtio.queue import Chain, QueueError, RingMemory, SplitQueue

_CLEARLY = 3
"""How many times as many must agree as agree on anything else."""
_SHARE = 32
"""One in so many must agree. With these two, and completions of 8 to 100 requests shuffled at
random, none of 30,000 answers was wrong."""


class ForeignQueue(SplitQueue):
    """A queue as the guest's driver set it up: its addresses for the back end, and, once that is
    gone, a queue like any other from where the back end has left it."""

    __slots__ = ()

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
        if heads is None:
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
) -> list[int] | None:
    """The heads that were made available and not returned since, in the driver's order; None where
    the rings don't tell.

    The rings hold the last `size` times of each, by the slot. What was returned at the n-th time
    had been made available before the time n + size. So a head whose last time among the available
    lies at or before its last time among the returned is not outstanding, and all others may be.
    Where they are as many as the indexes say, they are; else the past is asked (`_by_vote`). Both
    would overlook a request that waits while a whole round of the ring comes and goes.
    """
    count = (available_index - used_index) & 0xFFFF
    end = used_index + count
    # What was never written holds zeros, as returned at times before the ring's first.
    last_used = {used[time % size]: time for time in range(used_index - size, used_index)}
    last = {available[time % size]: time for time in range(end - size, end)}
    if any(head >= size for head in (*last, *last_used)):
        return None
    found = {head for head, time in last.items() if time > last_used.get(head, time - 1)}
    if len(found) != count:
        voted = _by_vote(size, count, available, used_index, used, found)
        if voted is None:
            return None
        found = voted
    return sorted(found, key=last.__getitem__)


def _by_vote(
    size: int,
    count: int,
    available: tuple[int, ...],
    used_index: int,
    used: tuple[int, ...],
    possible: set[int],
) -> set[int] | None:
    """Which of the `possible` heads are outstanding, as most times of the past have it.

    Take one, and suppose that exactly what was available until then had been returned by as many
    returns, whatever their order: then heads that came after and weren't returned are outstanding;
    none can have been returned more often than it came, or have come twice. Where the device mixes
    requests up across that time this is wrong, and mostly impossible. The times of which it is
    possible agree, or nothing is said.
    """
    owed = [0] * size
    wrong = 0
    votes: dict[frozenset[int], int] = {}
    for time in range(used_index + count - 1, used_index + count - size - 1, -1):
        changes = [(available[time % size], 1)]
        if time < used_index:
            changes.append((used[time % size], -1))
        for head, change in changes:
            before = owed[head]
            owed[head] = before + change
            wrong += (before + change not in (0, 1)) - (before not in (0, 1))
        if time <= used_index and not wrong:
            left = frozenset(head for head, number in enumerate(owed) if number)
            if left <= possible:
                votes[left] = votes.get(left, 0) + 1
    ranked = sorted(votes.items(), key=lambda vote: vote[1], reverse=True)
    if not ranked:
        return None
    winner, times = ranked[0]
    others = ranked[1][1] if len(ranked) > 1 else 0
    is_clear = times >= _CLEARLY * others and times * _SHARE >= size - count + 1
    return set(winner) if is_clear else None
