"""The split virtqueue from the device's side, by pread and pwrite only (virtio 1.2, 2.7).

One batch costs three preads (available index, new entries, descriptor table) and two pwrites (used
elements, used index), however many chains it has; an indirect chain adds a pread of its table.
Where the memory takes batches, index, entries and table come by one call, and indirect tables by a
second. Elements, index and the device's own last words go by a third. All that is in there was
written by a hostile guest: what does not add up raises QueueError.

Chains are followed in C (`kvm_bindings.virtqueue`) where nothing is unusual about them. What is
right and wrong is said here, in `_chain`, which looks at all that was found unusual.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain

from kvm_bindings.virtqueue import MOST_ENTRIES, Chains
from vmm.core.errors import PyvmmError
from vmm.core.lean_typing import TYPE_CHECKING, NamedTuple, Protocol
from vmm.devices.virtio.budget import Budget, Work

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

MAX_QUEUE_SIZE = 32768
MAX_CHAIN_BYTES = 1 << 32  # 2.7.5; one byte less, so that the used length can say it
ADDRESS_SPACE = 1 << 64

DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4
AVAIL_NO_INTERRUPT = 1
F_INDIRECT_DESC, F_EVENT_IDX = 1 << 28, 1 << 29  # what `features` of a queue may hold
# 2.7.5.3.1 allows as many as the queue has entries; drivers that shrank a queue take more.
MAX_INDIRECT = 1024

_INDEX = struct.Struct("<H")
_RING_HEADER = struct.Struct("<HH")  # flags, index
_DESCRIPTOR = struct.Struct("<QIHH")  # address, length, flags, next

# A piece of guest memory: (gpa, size). A tuple, because a busy queue makes thousands a second.
Segment = tuple[int, int]


class QueueError(PyvmmError):
    """The driver broke a rule of the ring; the device needs a reset."""


class RingMemory(Protocol):
    """The two verbs that rings need; both raise GuestMemoryError before a byte moves."""

    def pread(self, size: int, gpa: int) -> bytes: ...

    def pwrite(self, data: bytes, gpa: int) -> None: ...


class BatchMemory(RingMemory, Protocol):
    """Memory with verbs for many pieces at once: gpa, size, gpa, size..., in this order.

    They are refused as a whole (GuestMemoryError), before a byte moves.
    """

    def read_many(self, pieces: list[int]) -> bytes | bytearray: ...

    def write_many(self, pieces: list[int], data: bytes) -> None: ...


class QueueObserver(Protocol):
    """Told of each request that the device takes, and of those that go back to the guest."""

    def taken(self, chains: list[Chain]) -> None: ...

    def returned(self, used: list[tuple[int, int]]) -> None: ...


class Chain(NamedTuple):
    """One request: what the device may read, then what it may write. Empty pieces are left out."""

    head: int
    readable: list[Segment]
    writable: list[Segment]


class SplitQueue:
    """One enabled queue. Not locked: the transport serialises its use.

    `features` are those agreed on; F_INDIRECT_DESC and F_EVENT_IDX matter here.
    Raises QueueError when a ring is misaligned or runs past the address space (2.7, table).
    """

    __slots__ = (
        "_armed",
        "_avail",
        "_batch",
        "_chains",
        "_desc",
        "_event_index",
        "_indirect",
        "_looks",
        "_memory",
        "_next_avail",
        "_next_used",
        "_ring",
        "_used",
        "budget",
        "more",
        "observer",
        "patience",
        "size",
        "soon",
        "unfinished",
    )

    def __init__(
        self, memory: RingMemory, size: int, desc: int, avail: int, used: int, features: int = 0
    ) -> None:
        if size & (size - 1) or not 1 <= size <= MAX_QUEUE_SIZE:
            raise QueueError(f"queue size {size} is not a power of two up to {MAX_QUEUE_SIZE}")
        for name, gpa, alignment, length in (
            ("descriptor table", desc, 16, 16 * size),
            ("available ring", avail, 2, 6 + 2 * size),
            ("used ring", used, 4, 6 + 8 * size),
        ):
            if gpa % alignment or gpa + length > ADDRESS_SPACE:
                raise QueueError(f"{name} at {gpa:#x} is misaligned or leaves the address space")
        self._memory = memory
        # Not every memory has these verbs: one that announces each access does without.
        self._batch: BatchMemory | None = memory if hasattr(memory, "read_many") else None  # type: ignore[assignment]
        # All that a look at the queue needs, where that is little: index, entries, descriptors,
        # read in this order, that in which the driver's writes become visible.
        self._ring = [avail, 4, avail + 4, 2 * size, desc, 16 * size]
        self._chains: Chains | None = None
        self.size = size
        self._desc = desc
        self._avail = avail
        self._used = used
        self._indirect = bool(features & F_INDIRECT_DESC)
        self._event_index = bool(features & F_EVENT_IDX)
        self._armed = -1  # the available index whose notification was asked for, by event index
        self._next_avail = 0
        self._next_used = 0
        self.more = False
        """Whether there is more to take without another notify: the device's word for what it
        left, or the driver was quicker than the request to be notified."""
        self.soon = False
        """Whether there is more because a busy driver is likely to have it ready by now: worth a
        look before anybody else is served."""
        self.budget = Budget()
        """What the turn under way may still cost."""
        self.unfinished: tuple[int, Work] | None = None
        """A chain, by its head, that the last turn began with: it dies with the queue."""
        self.observer: QueueObserver | None = None
        self.patience = 0
        """How often the queue is looked at in vain, after something was taken, before the driver
        is asked to notify: a notify costs a busy driver an exit, and the device a wake-up."""
        self._looks = 0

    def state(self) -> State:
        """See vmm.core.saved.Stateful; with no chain `unfinished`."""
        return {"next_avail": self._next_avail, "next_used": self._next_used}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful: before the first take."""
        self._next_avail = saved.number("next_avail", 0xFFFF)
        self._next_used = saved.number("next_used", 0xFFFF)
        if self.outstanding > self.size:
            raise saved.bad(f"{self.outstanding} chains are taken from {self.size} entries")

    def take(self, most: int = MAX_QUEUE_SIZE) -> list[Chain]:
        """The chains that became available since the last call, in the driver's order.

        At most `most`, and no more than the turn's budget has descriptors and bytes for; the
        others stay. Once none are left, the driver is asked to notify. The index is read before
        the entries, and these before the descriptors: the order in which
        the driver's writes become visible.
        """
        taken = self._take(most)
        return listed(taken) if isinstance(taken, Chains) else taken

    def take_together(self, most: int = MAX_QUEUE_SIZE) -> Chains | list[Chain]:
        """As `take`, for callers that may not need a list (`listed` makes it): what is taken is
        good until the next call."""
        return self._take(most) if self._batch is not None else self.take(most)

    def _take(self, most: int) -> Chains | list[Chain]:
        most_descriptors, most_bytes = self.budget.left_to_take()
        if most_descriptors <= 0:
            self.more = True
            return []
        self.more = False
        ring: bytes | bytearray | None = None
        # After a look in vain, another one looks at the index alone.
        if (
            self._batch is not None
            and self.size <= MOST_ENTRIES
            and (
                not 0 < self._looks < self.patience - 1
                or self._available_index() != self._next_avail
            )
        ):
            ring = self._batch.read_many(self._ring)
            index = ring[2] | ring[3] << 8
        elif self._batch is None or self.size > MOST_ENTRIES:
            index = self._available_index()
        else:
            index = self._next_avail
        available = (index - self._next_avail) & 0xFFFF
        # What the device holds counts, too: another vCPU may move the index on during a turn,
        # and its chains would be more than the used ring has room for.
        if self.outstanding + available > self.size:
            raise QueueError(
                f"available index went from {self._next_avail} to {index} with "
                f"{self.outstanding} chains not returned, the queue has {self.size} entries"
            )
        count = min(available, most)
        taken: Chains | list[Chain] = []
        if count:
            found = None if ring is None else self._find(ring, count, most_descriptors, most_bytes)
            if found is None:
                taken, descriptors = self._follow(count, most_descriptors, most_bytes)
                count = len(taken)
            else:
                taken, descriptors, count = found, found.descriptors, found.count
            self.more = count < min(available, most)
            self.budget.descriptors_left -= descriptors
            self._next_avail = (self._next_avail + count) & 0xFFFF
            if self.observer is not None:
                self.observer.taken(listed(taken) if isinstance(taken, Chains) else taken)
        if count == available and self._event_index and self._armed != index:
            self._arm(index, count)
        return taken

    def _arm(self, index: int, count: int) -> None:
        """All that there was, `count`, has been taken: have the driver notify of what comes, or
        look again soon."""
        if count:
            self._looks = self.patience
        if self._looks:
            self._looks -= 1
            self.more = self.soon = True
            return
        # 2.7.10: ask for a notify, then look once more: the driver may not have seen it.
        self._memory.pwrite(_INDEX.pack(index), self._used + 4 + 8 * self.size)
        self._armed = index
        self.more = self._available_index() != index

    def _find(
        self, ring: bytes | bytearray, count: int, most_descriptors: int, most_bytes: int
    ) -> Chains | None:
        """The next `count` chains, or as many as the limits allow, if they are as usual."""
        assert self._batch is not None
        chains = self._chains
        if chains is None:
            chains = self._chains = Chains()
        size, first = self.size, self._next_avail
        tables: bytes | bytearray = b""
        if self._indirect:  # agreed on, so that there may be some
            pieces = chains.tables(ring, size, first, count, most_descriptors)
            if pieces is None:
                return None
            count = chains.count
            if pieces:
                tables = self._batch.read_many(pieces)
        found = chains.find(ring, size, first, count, tables, most_descriptors, most_bytes)
        return chains if found else None

    def _follow(
        self, count: int, most_descriptors: int, most_bytes: int
    ) -> tuple[list[Chain], int]:
        """As `_find`, one by one and whatever they are; and how many descriptors they have."""
        chains: list[Chain] = []
        descriptors = size = 0
        heads, table = self._read_entries(count)
        for head in heads:
            one, length, total = self._chain(table, head)
            chains.append(one)
            descriptors += length
            size += total
            if descriptors >= most_descriptors or size >= most_bytes:
                break
        return chains, descriptors

    @property
    def outstanding(self) -> int:
        """How many chains were taken and not returned; never more than the queue's size."""
        return (self._next_avail - self._next_used) & 0xFFFF

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where descriptor table, available ring and used ring are."""
        return self._desc, self._avail, self._used

    def resume(self, index: int) -> None:
        """Go on where all chains before number `index` were returned, in their order, and no other
        one: what was taken besides is there to be taken again."""
        self._next_avail = self._next_used = index
        self._armed = -1
        self._looks = 0

    def put_back(self, count: int) -> None:
        """Leave the last `count` chains of a `take` for the next one."""
        self._next_avail = (self._next_avail - count) & 0xFFFF

    def _available_index(self) -> int:
        index: int = _RING_HEADER.unpack(self._memory.pread(4, self._avail))[1]
        return index

    def publish(
        self, used: list[tuple[int, int]], before: Sequence[int] = (), data: bytes = b""
    ) -> bool:
        """Return chains as (head, bytes written), which are le32 on the ring; True when the driver
        wants an interrupt.

        `before`: pieces (gpa, size, gpa, size...) that `data` goes to first, where the memory
        takes batches. After an error (GuestMemoryError, OSError) all of them count as outstanding
        still, unless the driver was told: nothing is ever returned twice. Raises QueueError for
        more chains than are outstanding.
        """
        if not used:
            return False
        elements = struct.pack(f"<{2 * len(used)}I", *chain.from_iterable(used))
        return self.publish_elements(elements, before, data)

    def publish_elements(
        self, elements: bytes, before: Sequence[int] = (), data: bytes = b""
    ) -> bool:
        """As `publish`, for elements of the used ring (2.7.8), at least one."""
        count = len(elements) // 8
        if count > self.outstanding:
            raise QueueError(f"{count} chains to return, {self.outstanding} were taken")
        slot = self._next_used % self.size
        ring = self._used + 4
        until_wrap = 8 * (self.size - slot)
        pieces = [*before, ring + 8 * slot, min(len(elements), until_wrap)]
        if len(elements) > until_wrap:
            pieces += (ring, len(elements) - until_wrap)
        index = (self._next_used + count) & 0xFFFF
        pieces += (self._used + 2, 2)  # the index last: by then the driver may see the rest
        self._write(pieces, data + elements + _INDEX.pack(index))
        self._next_used = index
        if self.observer is not None:
            self.observer.returned(list(struct.iter_unpack("<II", elements)))
        return self._wants_interrupt(index, count)

    def _wants_interrupt(self, index: int, count: int) -> bool:
        """Whether the driver wants one (2.7.7) for the last `count` chains before used `index`.
        After the index was written: the driver sets flag or event, then looks at it once more."""
        if self._event_index:
            (event,) = _INDEX.unpack(self._memory.pread(2, self._avail + 4 + 2 * self.size))
            return (index - int(event) - 1) & 0xFFFF < count
        (flags,) = _INDEX.unpack(self._memory.pread(2, self._avail))
        return not flags & AVAIL_NO_INTERRUPT

    def _read_entries(self, count: int) -> tuple[tuple[int, ...], bytes | bytearray]:
        """The next `count` entries of the available ring, then the whole descriptor table."""
        slot = self._next_avail % self.size
        ring = self._avail + 4
        first = min(count, self.size - slot)
        pieces = [ring + 2 * slot, 2 * first]
        if count > first:
            pieces += (ring, 2 * (count - first))
        data = self._read([*pieces, self._desc, 16 * self.size])
        return struct.unpack_from(f"<{count}H", data), data[2 * count :]

    def _read(self, pieces: list[int]) -> bytes | bytearray:
        if self._batch is not None:
            return self._batch.read_many(pieces)
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        return b"".join([self._memory.pread(size, gpa) for gpa, size in pairs])

    def _write(self, pieces: list[int], data: bytes) -> None:
        if self._batch is not None:
            self._batch.write_many(pieces, data)
            return
        done = 0
        for gpa, size in zip(pieces[::2], pieces[1::2], strict=True):
            self._memory.pwrite(data[done : done + size], gpa)
            done += size

    def _chain(self, table: bytes | bytearray, head: int) -> tuple[Chain, int, int]:
        """Follow one chain through the copied table, which the guest can't change under us; the
        chain, how many descriptors were read for it (an indirect table's are, all of them), and
        its bytes."""
        readable: list[Segment] = []
        writable: list[Segment] = []
        total = 0
        index = head
        size = left = self.size
        direct = True
        before = 0  # descriptors in front of an indirect table
        while left:
            left -= 1
            if index >= size:
                raise QueueError(f"descriptor {index} of chain {head}: the table has {size}")
            gpa, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & DESC_INDIRECT:
                if not direct:
                    raise QueueError(f"chain {head}: an indirect table inside an indirect table")
                table = self._indirect_table(head, gpa, length, flags)
                before = size - left
                size = left = length // 16
                index, direct = 0, False
                continue
            total += length
            if gpa + length > ADDRESS_SPACE or total >= MAX_CHAIN_BYTES:
                raise QueueError(f"descriptor {index}: {length:#x} bytes at {gpa:#x} are too many")
            if flags & DESC_WRITE:
                if length:
                    writable.append((gpa, length))
            elif writable:
                raise QueueError(f"descriptor {index} is readable and follows a writable one")
            elif length:
                readable.append((gpa, length))
            if not flags & DESC_NEXT:
                read = size - left if direct else before + size
                return Chain(head, readable, writable), read, total
            index = following
        raise QueueError(f"chain {head} is a loop")

    def _indirect_table(self, head: int, gpa: int, length: int, flags: int) -> bytes:
        """2.7.5.3: a table of its own, with which the chain ends; its WRITE flag means nothing."""
        if not self._indirect:
            raise QueueError(f"chain {head} is indirect, which was not agreed on")
        if flags & DESC_NEXT:
            raise QueueError(f"chain {head} goes on after its indirect table")
        if length % 16 or not 0 < length <= 16 * MAX_INDIRECT or gpa + length > ADDRESS_SPACE:
            raise QueueError(
                f"chain {head}: indirect table of {length:#x} bytes at {gpa:#x}; "
                f"it holds 1 to {MAX_INDIRECT} descriptors of 16 bytes"
            )
        return self._memory.pread(length, gpa)


def listed(chains: Chains) -> list[Chain]:
    """What was found, one by one."""
    numbers = chains.numbers()
    made: list[Chain] = []
    at = 0
    while at < len(numbers):
        head, readable, writable = numbers[at : at + 3]
        middle = at + 3 + 2 * readable
        end = middle + 2 * writable
        made.append(
            Chain(
                head,
                list(zip(numbers[at + 3 : middle : 2], numbers[at + 4 : middle : 2], strict=True)),
                list(zip(numbers[middle:end:2], numbers[middle + 1 : end : 2], strict=True)),
            )
        )
        at = end
    return made
