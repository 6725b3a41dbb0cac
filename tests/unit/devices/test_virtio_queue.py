"""The split queue against drivers that keep the rules and drivers that don't."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    Piece,
    VirtioQueueDriver,
)
from vmm.core.errors import GuestMemoryError, PrivateAccess
from vmm.core.ranges import Range
from vmm.devices.virtio.queue import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    MAX_INDIRECT,
    QueueError,
    SplitQueue,
)

BASE = 0x1000


@pytest.fixture
def memory() -> Iterator[FakeMemory]:
    fake = FakeMemory()
    yield fake
    fake.close()


def make(
    memory: FakeMemory, size: int = 8, features: int = 0
) -> tuple[VirtioQueueDriver, SplitQueue]:
    driver = VirtioQueueDriver(memory, BASE, size)
    return driver, SplitQueue(memory, size, driver.desc, driver.avail, driver.used, features)


def take(driver: VirtioQueueDriver, queue: SplitQueue, count: int) -> None:
    """Have the device take so many chains of the descriptor table, which is all zeros."""
    driver.available = (driver.available + count) & 0xFFFF
    driver.set_available_index(driver.available)
    assert len(queue.take()) == count


def test_queue_take_gives_chains_in_order_and_once(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    first = driver.chain([Piece(0x100, 16), Piece(0x200, 5, True)])
    second = driver.chain([Piece(0x300, 1, True)])
    driver.offer(second, first)

    chains = queue.take()

    assert [chain.head for chain in chains] == [second, first]
    assert chains[1].readable == [(0x100, 16)]
    assert chains[1].writable == [(0x200, 5)]
    assert queue.take() == []


def test_queue_empty_poll_costs_one_read(memory: FakeMemory) -> None:
    _, queue = make(memory)

    queue.take()

    assert memory.calls == {"pread": 1}


def test_queue_wraps_its_rings_and_its_indexes(memory: FakeMemory) -> None:
    """70,000 chains in batches of 3 in a ring of 8: ring and 16-bit index wrap everywhere."""
    driver, queue = make(memory)
    driver.descriptor(0, 0x100, 1, 0, 0)
    driver.descriptor(1, 0x100, 2, 0, 0)
    driver.descriptor(2, 0x100, 3, 0, 0)
    for _ in range(70_000 // 3):
        driver.offer(0, 1, 2)
        chains = queue.take()
        assert [chain.readable[0][1] for chain in chains] == [1, 2, 3]
        queue.publish([(chain.head, 7) for chain in chains])
        assert driver.collect() == [(0, 7), (1, 7), (2, 7)]


def test_queue_publish_writes_the_index_last(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    writes: list[int] = []
    memory.before = lambda verb, gpa: writes.append(gpa) if verb == "pwrite" else None

    for count in (7, 2):
        take(driver, queue, count)
        queue.publish([(0, 1)] * count)

    assert writes == [
        driver.used + 4,
        driver.used + 2,
        driver.used + 4 + 56,
        driver.used + 4,
        driver.used + 2,
    ]


def test_queue_publish_honours_no_interrupt(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    take(driver, queue, 2)

    assert queue.publish([(0, 1)])
    driver.set_available_index(2, flags=1)
    assert not queue.publish([(0, 1)])
    assert not queue.publish([])


def test_queue_empty_descriptors_are_left_out(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    driver.offer(driver.chain([Piece(0x100, 0), Piece(1 << 50, 0), Piece(0x100, 1, True)]))

    (chain,) = queue.take()

    assert (chain.readable, chain.writable) == ([], [(0x100, 1)])


def test_queue_chain_as_long_as_the_table_is_fine(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    driver.offer(driver.chain([Piece(0x100 * i, 1) for i in range(8)]))

    assert len(queue.take()[0].readable) == 8


@pytest.mark.parametrize(
    ("descriptors", "message"),
    [
        ([(0x100, 1, DESC_NEXT, 0)], "loop"),
        ([(0x100, 1, DESC_NEXT, 1), (0x100, 1, DESC_NEXT, 0)], "loop"),
        ([(0x100, 1, DESC_NEXT, 8)], "descriptor 8"),
        ([(0x100, 1, DESC_NEXT, 0xFFFF)], "descriptor 65535"),
        ([(0x100, 16, DESC_INDIRECT, 0)], "indirect"),
        ([(0x100, 1, DESC_NEXT | DESC_WRITE, 1), (0x100, 1, 0, 0)], "follows a writable"),
        ([(0x100, 0, DESC_NEXT | DESC_WRITE, 1), (0x100, 1, DESC_INDIRECT, 0)], "indirect"),
        ([((1 << 64) - 1, 2, 0, 0)], "too many"),
        ([(0x100, 0xFFFF_FFFF, DESC_NEXT, 1), (0x100, 1, 0, 0)], "too many"),
    ],
)
def test_queue_bad_chain_is_a_queue_error(
    memory: FakeMemory, descriptors: list[tuple[int, int, int, int]], message: str
) -> None:
    driver, queue = make(memory)
    for index, descriptor in enumerate(descriptors):
        driver.descriptor(index, *descriptor)
    driver.offer(0)

    with pytest.raises(QueueError, match=message):
        queue.take()


@pytest.mark.parametrize("head", [8, 0x7FFF, 0xFFFF])
def test_queue_head_outside_the_table_is_a_queue_error(memory: FakeMemory, head: int) -> None:
    driver, queue = make(memory)
    driver.offer(head)

    with pytest.raises(QueueError, match=f"descriptor {head}"):
        queue.take()


@pytest.mark.parametrize("index", [9, 0x8000, 0xFFFF])
def test_queue_available_index_that_jumps_is_a_queue_error(memory: FakeMemory, index: int) -> None:
    driver, queue = make(memory)
    driver.set_available_index(index)

    with pytest.raises(QueueError, match=f"to {index}"):
        queue.take()


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        (0, 0, 0, 0),
        (3, 0, 0, 0),
        (65536, 0, 0, 0),
        (8, 8, 0, 0),
        (8, 0, 1, 0),
        (8, 0, 0, 2),
        (8, (1 << 64) - 16, 0, 0),
        (8, 0, (1 << 64) - 2, 0),
        (8, 0, 0, (1 << 64) - 4),
    ],
)
def test_queue_rings_that_cannot_be_are_a_queue_error(
    memory: FakeMemory, size: int, desc: int, avail: int, used: int
) -> None:
    with pytest.raises(QueueError):
        SplitQueue(memory, size, desc, avail, used)


@pytest.mark.parametrize("ring", ["desc", "avail"])
def test_queue_private_ring_raises_the_memorys_error(memory: FakeMemory, ring: str) -> None:
    driver, queue = make(memory)
    driver.offer(driver.chain([Piece(0x100, 1)]))
    memory.private.append(Range(getattr(driver, ring) + 4, 2))

    with pytest.raises(PrivateAccess):
        queue.take()


def test_queue_descriptors_are_copied_once_however_long_the_chain(memory: FakeMemory) -> None:
    """What is validated is what is used: a guest that rewrites the table changes nothing."""
    driver, queue = make(memory)
    driver.offer(driver.chain([Piece(0x100 * i, 1) for i in range(8)]))

    (chain,) = queue.take()
    memory.poke(b"\xff" * 128, driver.desc)

    assert chain.readable == [(0x100 * i, 1) for i in range(8)]
    assert memory.calls["pread"] == 3


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0x100, (1 << 64) - 1])),
            st.one_of(st.integers(0, 0xFFFF_FFFF), st.sampled_from([0, 1, 16])),
            st.one_of(st.integers(0, 3), st.integers(0, 0xFFFF)),
            st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)),
        ),
        min_size=8,
        max_size=8,
    ),
    st.lists(st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)), min_size=8, max_size=8),
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
)
def test_queue_any_rings_give_valid_chains_or_a_queue_error(
    table: list[tuple[int, int, int, int]], ring: list[int], index: int
) -> None:
    memory = FakeMemory(0x4000)
    driver, queue = make(memory)
    for slot, descriptor in enumerate(table):
        driver.descriptor(slot, *descriptor)
    memory.poke(struct.pack("<8H", *ring), driver.avail + 4)
    driver.set_available_index(index)

    try:
        chains = queue.take()
    except (QueueError, GuestMemoryError):
        chains = []
    finally:
        memory.close()

    assert len(chains) <= 8
    for chain in chains:
        segments = chain.readable + chain.writable
        assert chain.head < 8
        assert len(segments) <= 8
        assert all(size > 0 and gpa + size <= 1 << 64 for gpa, size in segments)
        assert sum(size for _, size in segments) < 1 << 32


# --- a few at a time ---


def test_queue_take_of_some_leaves_the_rest(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    heads = [driver.chain([Piece(0x100, 1)]) for _ in range(5)]
    driver.offer(*heads)

    assert [chain.head for chain in queue.take(2)] == heads[:2]
    assert not queue.more
    assert [chain.head for chain in queue.take(2)] == heads[2:4]
    queue.put_back(1)
    assert [chain.head for chain in queue.take()] == heads[3:]


# --- event indexes (2.7.7, 2.7.10) ---


def test_queue_event_index_asks_for_a_notify_when_all_is_taken(memory: FakeMemory) -> None:
    driver, queue = make(memory, features=F_EVENT_IDX)
    driver.offer(*[driver.chain([Piece(0x100, 1)]) for _ in range(3)])
    memory.poke(b"\xee\xee", driver.used + 4 + 8 * driver.size)

    queue.take(2)
    assert driver.notify_event() == 0xEEEE  # one is left: no notify is needed
    queue.take(2)
    assert driver.notify_event() == 3


def test_queue_event_index_that_comes_too_late_leaves_more(memory: FakeMemory) -> None:
    driver, queue = make(memory, features=F_EVENT_IDX)
    heads = [driver.chain([Piece(0x100, 1)]) for _ in range(2)]
    driver.offer(heads[0])

    def offer_another(verb: str, _: int) -> None:
        if verb == "pwrite":  # the driver adds one just before the event index gets there
            memory.before = None
            driver.offer(heads[1])

    memory.before = offer_another
    assert [chain.head for chain in queue.take()] == heads[:1]
    assert queue.more
    assert [chain.head for chain in queue.take()] == heads[1:]
    assert not queue.more


@pytest.mark.parametrize(
    ("event", "wanted"),
    [(0xFFFE, False), (0xFFFF, True), (0, True), (1, True), (2, False), (0x8000, False)],
)
def test_queue_event_index_decides_about_the_interrupt(
    memory: FakeMemory, event: int, wanted: bool
) -> None:
    """An interrupt when the used index passes the driver's event; here it goes to 2 over a wrap."""
    driver, queue = make(memory, features=F_EVENT_IDX)
    for count in [8] * (0xFFFF // 8) + [7]:
        take(driver, queue, count)
        queue.publish([(0, 0)] * count)
    take(driver, queue, 3)
    memory.poke(struct.pack("<H", event), driver.avail + 4 + 2 * driver.size)

    assert queue.publish([(0, 0)] * 3) is wanted


# --- indirect descriptors (2.7.5.3) ---

TABLE = 0x9000


def indirect(memory: FakeMemory, *descriptors: tuple[int, int, int, int]) -> int:
    """Write an indirect table; its size."""
    data = b"".join(struct.pack("<QIHH", *descriptor) for descriptor in descriptors)
    memory.poke(data, TABLE)
    return len(data)


def test_queue_indirect_table_follows_direct_descriptors(memory: FakeMemory) -> None:
    driver, queue = make(memory, features=F_INDIRECT_DESC)
    size = indirect(memory, (0x200, 2, DESC_NEXT, 2), (0, 0, 0, 0), (0x300, 3, DESC_WRITE, 0))
    driver.descriptor(0, 0x100, 1, DESC_NEXT, 1)
    driver.descriptor(1, TABLE, size, DESC_INDIRECT | DESC_WRITE, 0)  # WRITE means nothing here
    driver.offer(0)

    (chain,) = queue.take()

    assert chain.readable == [(0x100, 1), (0x200, 2)]
    assert chain.writable == [(0x300, 3)]


def test_queue_indirect_table_may_be_longer_than_the_queue(memory: FakeMemory) -> None:
    driver, queue = make(memory, size=2, features=F_INDIRECT_DESC)
    rows = [(0x100, 1, DESC_NEXT, i + 1) for i in range(MAX_INDIRECT - 1)]
    size = indirect(memory, *rows, (0x100, 1, 0, 0))
    driver.descriptor(0, TABLE, size, DESC_INDIRECT, 0)
    driver.offer(0)

    assert len(queue.take()[0].readable) == MAX_INDIRECT


@pytest.mark.parametrize(
    ("size", "flags", "rows", "message"),
    [
        (16, DESC_INDIRECT | DESC_NEXT, [(0x100, 1, 0, 0)], "goes on after"),
        (0, DESC_INDIRECT, [], "indirect table of 0x0"),
        (24, DESC_INDIRECT, [(0x100, 1, 0, 0)], "indirect table of 0x18"),
        (16 * (MAX_INDIRECT + 1), DESC_INDIRECT, [], "1 to 1024"),
        (16, DESC_INDIRECT, [(TABLE, 16, DESC_INDIRECT, 0)], "inside an indirect"),
        (16, DESC_INDIRECT, [(0x100, 1, DESC_NEXT, 0)], "loop"),
        (32, DESC_INDIRECT, [(0x100, 1, DESC_NEXT, 2), (0, 0, 0, 0)], "the table has 2"),
        (
            32,
            DESC_INDIRECT,
            [(0x100, 1, DESC_WRITE | DESC_NEXT, 1), (0, 1, 0, 0)],
            "follows a writable",
        ),
    ],
)
def test_queue_bad_indirect_table_is_a_queue_error(
    memory: FakeMemory,
    size: int,
    flags: int,
    rows: list[tuple[int, int, int, int]],
    message: str,
) -> None:
    driver, queue = make(memory, features=F_INDIRECT_DESC)
    indirect(memory, *rows)
    driver.descriptor(0, TABLE, size, flags, 0)
    driver.offer(0)

    with pytest.raises(QueueError, match=message):
        queue.take()


def test_queue_private_indirect_table_is_refused(memory: FakeMemory) -> None:
    driver, queue = make(memory, features=F_INDIRECT_DESC)
    driver.descriptor(0, TABLE, 16, DESC_INDIRECT, 0)
    driver.offer(0)
    memory.private.append(Range(TABLE, 0x1000))

    with pytest.raises(PrivateAccess):
        queue.take()


# --- what is outstanding, and what was returned ---


def test_queue_index_that_moves_on_during_a_turn_is_refused_at_the_ring_size(
    memory: FakeMemory,
) -> None:
    """Each take alone is within bounds; together they would be more than the used ring holds."""
    driver, queue = make(memory)
    driver.set_available_index(driver.size)
    queue.take()
    driver.set_available_index(driver.size + 1)  # another vCPU, before anything is returned

    with pytest.raises(QueueError, match="8 chains not returned"):
        queue.take()

    assert queue.outstanding == driver.size


def test_queue_index_that_moves_on_after_a_return_is_served(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    driver.set_available_index(driver.size)
    chains = queue.take()
    queue.publish([(chain.head, 0) for chain in chains[:3]])
    driver.set_available_index(driver.size + 3)

    assert len(queue.take()) == 3
    assert queue.outstanding == driver.size


def test_queue_put_back_is_not_outstanding(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    driver.set_available_index(driver.size)
    queue.take()

    queue.put_back(5)

    assert queue.outstanding == 3
    assert len(queue.take()) == 5


def test_queue_publish_of_more_than_was_taken_is_refused_unwritten(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    driver.set_available_index(2)
    queue.take()

    with pytest.raises(QueueError, match="3 chains to return, 2 were taken"):
        queue.publish([(0, 0)] * 3)

    assert driver.used_index() == 0


def test_queue_publish_that_is_refused_moves_no_index(memory: FakeMemory) -> None:
    driver, queue = make(memory)
    driver.set_available_index(2)
    queue.take()
    memory.private.append(Range(driver.used, 4096))
    with pytest.raises(GuestMemoryError):
        queue.publish([(0, 7), (1, 8)])
    memory.private.clear()

    queue.publish([(0, 7), (1, 8)])

    assert driver.used_index() == 2
    assert driver.collect() == [(0, 7), (1, 8)]


def test_queue_publish_that_the_driver_saw_cannot_be_repeated(memory: FakeMemory) -> None:
    """The available ring, whose flags are read last, became private: the used index has moved."""
    driver, queue = make(memory)
    driver.set_available_index(1)
    queue.take()
    memory.private.append(Range(driver.avail, 4))

    for error in (GuestMemoryError, QueueError):
        with pytest.raises(error):
            queue.publish([(0, 7)])

    assert driver.used_index() == 1
