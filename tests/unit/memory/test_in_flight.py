"""Host accesses and conversions of the same pages: whoever comes second waits or is refused.

Rule 2 in time: a conversion never proceeds while a host access to its pages is under way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_bindings import mapped
from tests.support.memory import Background, GatedBacking, guest_memory, page, pages
from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.engines import make_engine
from vmm.memory.guest_memory import GuestMemory, MemoryThrough, PageState

FOREVER = threading.TIMEOUT_MAX


def tell_when_waiting(memory: GuestMemory) -> threading.Event:
    """An event set when `quiesce` is about to wait, while it holds the lock still."""
    waiting = threading.Event()
    condition = memory._drained
    wait = condition.wait

    def told(timeout: float | None = None) -> bool:
        waiting.set()
        return wait(timeout)

    condition.wait = told  # type: ignore[method-assign]
    return waiting


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[GuestMemory, GatedBacking]]:
    """64 shared pages whose pread and transfer_in wait at a gate, and so does the kernel when their
    mapping is its buffer."""
    backing = GatedBacking(page(64))
    for name in ("move_in", "move_out"):
        monkeypatch.setattr(mapped, name, behind_gate(backing, getattr(mapped, name)))
    with guest_memory(shared=backing) as memory:
        yield memory, backing
        backing.gate.set()


def behind_gate(backing: GatedBacking, call: Callable[..., int]) -> Callable[..., int]:
    def gated(*arguments: Any) -> int:
        backing.wait()
        return call(*arguments)

    return gated


def by_hva(memory: GuestMemory) -> MemoryThrough:
    return memory.through(make_engine("hva", memory.shared))


ACCESSES: dict[str, Callable[[GuestMemory, int], object]] = {
    "pread": lambda memory, fd: memory.pread(2 * PAGE_SIZE, page(4)),
    "transfer_in": lambda memory, fd: memory.transfer_in(fd, 0, page(4), 2 * PAGE_SIZE),
    "hva, in": lambda memory, fd: by_hva(memory).move_in(fd, [0, page(4), 2 * PAGE_SIZE]),
    "hva, out": lambda memory, fd: by_hva(memory).transfer_out(page(4), 2 * PAGE_SIZE, fd, 0),
}


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("file")
    os.truncate(fd, page(4))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("name", ACCESSES)
@pytest.mark.parametrize("area", [pages(0, 5), pages(5, 1), pages(4, 2), pages(0, 64)], ids=str)
def test_quiesce_waits_for_an_access_that_came_first(
    gated: tuple[GuestMemory, GatedBacking], file: int, name: str, area: Range
) -> None:
    memory, backing = gated
    access = Background(lambda: ACCESSES[name](memory, file))
    backing.await_arrivals()
    memory.begin_conversion(area)

    in_time = memory.quiesce(area, 0)
    waits = tell_when_waiting(memory)
    waiting = Background(lambda: memory.quiesce(area, FOREVER))
    assert waits.wait(30)
    backing.gate.set()

    assert in_time is False
    assert waiting.result() is True
    assert access.result() in (bytes(2 * PAGE_SIZE), 2 * PAGE_SIZE)
    memory.abandon_conversion()


def test_pages_that_the_kernel_filled_by_their_mapping_are_gone_after_an_unshare(
    file: int,
) -> None:
    os.pwrite(file, b"guest" * 2000, 0)
    with guest_memory(pages(8, 8)) as memory:
        by_hva(memory).move_in(file, [0, page(2), page(2)])
        filled = memory.shared.resident_bytes()

        memory.begin_conversion(pages(2, 1))
        with pytest.raises(PrivateAccess):
            by_hva(memory).move_in(file, [0, page(2), page(2)])
        memory.discard_shared(pages(2, 1))
        memory.finish_conversion(PageState.PRIVATE)
        with pytest.raises(PrivateAccess):
            by_hva(memory).move_out([page(2), 0, 512], file)

        assert filled == page(2)
        assert memory.shared.resident_bytes() == page(1)
        assert memory.shared.pread(page(1), page(2)) == bytes(page(1))


@pytest.mark.parametrize("area", [pages(0, 4), pages(6, 10)], ids=str)
def test_quiesce_does_not_wait_for_an_access_elsewhere(
    gated: tuple[GuestMemory, GatedBacking], area: Range
) -> None:
    memory, backing = gated
    access = Background(lambda: memory.pread(2 * PAGE_SIZE, page(4)))
    backing.await_arrivals()
    memory.begin_conversion(area)

    assert memory.quiesce(area, 0) is True

    backing.gate.set()
    access.result()


def test_quiesce_waits_for_every_thread(gated: tuple[GuestMemory, GatedBacking]) -> None:
    memory, backing = gated
    accesses = [
        Background(lambda: memory.pread(1, page(0))),
        Background(lambda: memory.pread(1, page(1))),
        Background(lambda: memory.pread(1, page(2))),
    ]
    backing.await_arrivals(3)
    waits = tell_when_waiting(memory)
    waiting = Background(lambda: memory.quiesce(pages(0, 3), FOREVER))
    assert waits.wait(30)
    backing.gate.set()

    assert waiting.result() is True
    assert [each.result() for each in accesses] == [b"\0"] * 3
    assert memory._in_flight == {}


def test_access_that_comes_second_is_refused_until_the_conversion_is_over() -> None:
    with guest_memory() as memory:
        memory.begin_conversion(pages(4, 1))

        with pytest.raises(PrivateAccess, match="converting"):
            memory.pread(1, page(4))
        assert memory.quiesce(pages(4, 1), 0) is True, "a refused access is not under way"
        memory.abandon_conversion()

        assert memory.pread(1, page(4)) == b"\0"


def test_access_that_comes_after_an_unshare_is_refused() -> None:
    with guest_memory() as memory:
        memory.begin_conversion(pages(4, 1))
        memory.finish_conversion(PageState.PRIVATE)

        with pytest.raises(PrivateAccess, match="private"):
            memory.pread(1, page(4))


# Accesses of several pieces. What lies between two of them is untouched.


def test_quiesce_does_not_wait_for_pages_between_the_pieces_of_an_access(
    gated: tuple[GuestMemory, GatedBacking],
) -> None:
    memory, backing = gated
    access = Background(lambda: memory.read_many([page(2), 16, page(60), PAGE_SIZE]))
    backing.await_arrivals()
    memory.begin_conversion(pages(30, 4))

    assert memory.quiesce(pages(30, 4), 0) is True

    backing.gate.set()
    access.result()


def test_quiesce_does_not_wait_for_an_access_that_began_after_it(
    gated: tuple[GuestMemory, GatedBacking],
) -> None:
    """Queues that always have an access under way could hold a conversion off for ever."""
    memory, backing = gated
    at_it = Background(lambda: memory.read_many([page(2), 16, page(30), 16]))
    backing.await_arrivals()
    memory.begin_conversion(pages(30, 1))
    waits = tell_when_waiting(memory)
    waiting = Background(lambda: memory.quiesce(pages(30, 1), FOREVER))
    assert waits.wait(30)
    memory._enter_many([page(2), 16, page(60), 16])  # on this thread, and it stays under way

    backing.gate.set()

    assert waiting.result() is True
    at_it.result()
    assert len(memory._in_flight) == 1
    memory._leave()


ACCESS = st.lists(st.tuples(st.integers(0, page(62)), st.integers(1, 8192)), min_size=1)


@settings(max_examples=200, deadline=None)
@given(accesses=st.lists(ACCESS, min_size=1, max_size=3), first=st.integers(0, 63), data=st.data())
def test_quiesce_waits_only_if_a_piece_lies_in_the_range(
    accesses: list[list[tuple[int, int]]], first: int, data: st.DataObject
) -> None:
    area = pages(first, data.draw(st.integers(1, 64 - first)))
    with guest_memory() as memory:
        for number, pieces in enumerate(accesses):
            memory._enter_many([word for piece in pieces for word in piece])
            # As if another thread's: none of them leaves.
            memory._in_flight[-number] = memory._in_flight.pop(threading.get_ident())
        touched = [
            (gpa, size)
            for pieces in accesses
            for gpa, size in pieces
            if gpa < area.end and area.start < gpa + size
        ]

        memory.begin_conversion(area)

        assert memory.quiesce(area, 0) is (not touched)


def test_access_to_pages_used_before_a_conversion_is_refused_once_it_begins() -> None:
    """What was found to be shared is looked at anew."""
    with guest_memory() as memory:
        memory.pread(16, page(9))
        memory.read_many([page(8), 4, page(20), 4])
        memory.begin_conversion(pages(8, 2))
        for _ in range(2):  # nor does a refusal leave anything behind
            with pytest.raises(PrivateAccess):
                memory.pread(16, page(9))
            with pytest.raises(PrivateAccess):
                memory.read_many([page(8), 4, page(20), 4])
        memory.pread(16, page(20))
        memory.finish_conversion(PageState.PRIVATE)

        with pytest.raises(PrivateAccess):
            memory.pread(16, page(9))
        assert memory.pread(1, page(10)) == b"\0"
        with pytest.raises(PrivateAccess):
            memory.pread(PAGE_SIZE + 1, page(7))


def test_access_of_no_bytes_where_shared_pages_end_is_refused() -> None:
    with guest_memory() as memory:
        memory.begin_conversion(pages(8, 2))
        memory.finish_conversion(PageState.PRIVATE)
        memory.pread(1, page(7))

        with pytest.raises(PrivateAccess):
            memory.pread(0, page(8))
        with pytest.raises(UnmappedAccess):
            memory.pread(-1, page(7))
