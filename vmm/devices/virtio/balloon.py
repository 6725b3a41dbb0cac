"""virtio-balloon (virtio 1.2, 5.5): pages that the guest does without go back to the host.

Requests are lists of le32 page numbers; statistics are struct {le16 tag; le64 value}; reported
free pages are the buffers of their chains. What a page's state is decides which side is
discarded: a private page's private side, which is the guest's to give up.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial

from vmm.core.lean_typing import TYPE_CHECKING
from vmm.devices.virtio.budget import Budget, Work
from vmm.devices.virtio.device import GuestMemory, IoStatistics, VirtioDevice
from vmm.devices.virtio.queue import Chain, QueueError, SplitQueue
from vmm.devices.virtio.segments import aligned_pieces, cut, first, gather, total

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

F_STATS_VQ, F_DEFLATE_ON_OOM = 1 << 1, 1 << 2
F_PAGE_POISON, F_REPORTING = 1 << 4, 1 << 5
F_ACCESS_PLATFORM = 1 << 33

INFLATE, DEFLATE, STATS = 0, 1, 2
# 5.5.2 says 4 with or without free page hints (queue 3), which aren't offered; drivers of QEMU's
# making use 3 then.
REPORTING = (3, 4)
QUEUE_SIZE = 128
PAGE = 4096
MOST_PAGES = 1 << 16  # in one request; Linux' have 256
PAGES_AT_ONCE = 1024  # of a request, read and sorted together
DISCARD_AT_ONCE = 2 << 20  # bytes; the kernel may have a page of each state in there
MOST_REPORTED = 1 << 30  # bytes in one report; Linux reports 32 ranges of 4 MiB at most
_U32 = 0xFFFF_FFFF
_CONFIG = struct.Struct("<IIII")  # num_pages, actual, free_page_hint_cmd_id, poison_val
_ACTUAL, _POISON = 4, 12
_STATISTIC = struct.Struct("<HQ")
_STATISTICS_BYTES = 64 * _STATISTIC.size
STATISTIC_NAMES = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory",
    "available_memory", "disk_caches", "hugetlb_allocations", "hugetlb_failures",
)  # fmt: skip


class BalloonStatistics(IoStatistics):
    """What the report says of the balloon, in bytes: all that was ever given up, taken back,
    reported free, and the balloon's size in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.inflated = 0
        self.deflated = 0
        self.reported = 0
        self.size = 0


class VirtioBalloon(VirtioDevice):
    """A balloon that is to hold `pages` pages of 4 KiB.

    `heard` is called, on the loop's thread, with the statistics that `ask` has asked for.
    """

    device_id = 5
    pci_class = 0xFF0000  # fits no class
    queue_sizes: Sequence[int] = (QUEUE_SIZE,) * 5
    features = F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_REPORTING
    # Linux' driver never accepts it: it hands over physical addresses.
    may_decline = F_ACCESS_PLATFORM

    statistics: BalloonStatistics

    def __init__(self, pages: int = 0) -> None:
        super().__init__()
        self.statistics = BalloonStatistics()
        self._pages = pages
        self._actual = 0
        self._poison = 0
        self._asked: Chain | None = None  # the statistics buffer, which is the driver's answer
        self._asking = False
        self._answer_due = False
        self.heard: Callable[[dict[str, int]], None] | None = None

    # --- the host's wishes (on the loop's thread) ---

    def resize(self, pages: int) -> None:
        """Ask the guest for a balloon of that size."""
        self._pages = pages
        self.announce()

    def ask(self) -> None:
        """Ask for statistics; `heard` gets them when the guest answers."""
        self._asking = True
        self.wake(STATS)

    # --- the transport's side ---

    def config(self) -> bytes:
        """struct virtio_balloon_config (5.5.4)."""
        return _CONFIG.pack(self._pages, self._actual, 0, self._poison)

    def write_config(self, offset: int, data: bytes) -> None:
        if len(data) == 4 and offset == _ACTUAL:
            self._actual = int.from_bytes(data, "little")
            self.statistics.size = self._actual * PAGE
        elif len(data) == 4 and offset == _POISON:
            self._poison = int.from_bytes(data, "little")

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        super().activate(memory, queues, features)
        self._asked = None

    def reset(self) -> None:
        super().reset()
        self._asked = None
        self._answer_due = False
        self._actual = self._poison = 0
        self.statistics.size = 0

    def state(self) -> State:
        """See vmm.core.saved.Stateful."""
        asked = self._asked
        return {
            "pages": self._pages,
            "actual": self._actual,
            "poison": self._poison,
            "asked": None if asked is None else asked.head,
        }

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful. Who had asked for statistics has gone."""
        self._pages = saved.number("pages", _U32)
        self._actual = saved.number("actual", _U32)
        self._poison = saved.number("poison", _U32)
        self.statistics.size = self._actual * PAGE
        if saved.has("asked"):
            head = saved.number("asked", QUEUE_SIZE - 1)
            queue = self._queues.get(STATS)
            if queue is not None:
                if head >= queue.size or queue.outstanding != 1:
                    raise saved.bad(f"statistics buffer {head} is none that was taken")
                self._asked = Chain(head, [], [])  # its answer has been read

    def process(self, queue_index: int) -> bool:
        queue = self._queues[queue_index]
        if queue_index == STATS:
            return self._exchange_statistics(queue)
        if queue_index in REPORTING:
            return self.answer_all(queue, partial(self._report, queue))
        return self.answer_all(queue, self._inflate if queue_index == INFLATE else self._deflate)

    # --- requests ---

    def _page_runs(self, chain: Chain) -> Iterator[tuple[int, int]]:
        """The pages that a request names as (gpa, size), neighbours joined; the list is read
        bit by bit."""
        assert self._memory is not None
        self.statistics.requests += 1
        size = total(chain.readable)
        if size % 4 or size > 4 * MOST_PAGES:
            raise QueueError(f"balloon request {chain.head} of {size} bytes is no list of pages")
        for piece in cut(chain.readable, 4 * PAGES_AT_ONCE):
            numbers = gather(self._memory, piece)
            pages = sorted({number for (number,) in struct.iter_unpack("<I", numbers)})
            start = 0
            for at, page in enumerate(pages):
                if at + 1 == len(pages) or pages[at + 1] != page + 1:
                    yield pages[start] * PAGE, (at + 1 - start) * PAGE
                    start = at + 1

    def _discard(self, gpa: int, size: int, budget: Budget) -> Generator[None, None, None]:
        """Whole pages back to the host's kernel, a few at a time."""
        for start, part in aligned_pieces(gpa, size, DISCARD_AT_ONCE):
            assert self._memory is not None
            self._memory.discard(start, part)
            if not budget.spend(1, part):
                yield

    def _inflate(self, chain: Chain) -> Work:
        budget = self._queues[INFLATE].budget
        for gpa, size in self._page_runs(chain):
            yield from self._discard(gpa, size, budget)
            self.statistics.inflated += size
        return 0

    def _deflate(self, chain: Chain) -> Work:
        """Nothing to do: a page that the guest touches comes back, and is zero."""
        budget = self._queues[DEFLATE].budget
        for _, size in self._page_runs(chain):
            self.statistics.deflated += size
            if not budget.spend():
                yield
        return 0

    def _report(self, queue: SplitQueue, chain: Chain) -> Work:
        """Free pages. With F_PAGE_POISON they must come back as the guest has left them (5.5.6.5):
        those that aren't zero stay."""
        self.statistics.requests += 1
        if total(chain.writable) > MOST_REPORTED:
            raise QueueError(f"report {chain.head} names {total(chain.writable):#x} bytes")
        if self._agreed & F_PAGE_POISON and self._poison:
            return 0
        for gpa, size in chain.writable:
            if gpa % PAGE or size % PAGE:
                raise QueueError(f"report {chain.head} names {size:#x} bytes at {gpa:#x}, no pages")
            yield from self._discard(gpa, size, queue.budget)
            self.statistics.reported += size
        return 0

    # --- statistics ---

    def _exchange_statistics(self, queue: SplitQueue) -> bool:
        """The driver's buffer is the answer to the last question; giving it back is the next."""
        for chain in queue.take():
            if self._asked is not None:
                raise QueueError("a second statistics buffer before the first was returned")
            self._asked = chain
            self._read_statistics(chain)
        if not (self._asking and self._asked is not None):
            return False
        self._asking = False
        head, self._asked = self._asked.head, None
        self._answer_due = True
        return queue.publish([(head, 0)])

    def _read_statistics(self, chain: Chain) -> None:
        assert self._memory is not None
        data = gather(self._memory, first(chain.readable, _STATISTICS_BYTES))
        whole = len(data) - len(data) % _STATISTIC.size
        values = {
            STATISTIC_NAMES[tag]: value
            for tag, value in _STATISTIC.iter_unpack(data[:whole])
            if tag < len(STATISTIC_NAMES)
        }
        if self._answer_due and self.heard is not None:
            self._answer_due = False
            self.heard(values)
