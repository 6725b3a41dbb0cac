"""Common memory, one memory at both aliases: conversions change who may touch it, and lose nothing.

Every page of it in these tests is filled before, as if by the guest through either alias.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.conversion import RecordingScheme, share, unshare
from tests.support.memory import data_pages, guest_memory, page, pages, pattern
from vmm.conversion.transaction import Converter
from vmm.core.errors import PrivateAccess
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Decision, Defer, Event, Policy, View

FIRST, COMMON = 4, 8
CONTENT = pattern(COMMON * PAGE_SIZE)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 private pages, of which 8 from the fourth on are common."""
    with guest_memory(pages(0, 64), common=pages(FIRST, COMMON)) as made:
        made.shared.pwrite(CONTENT, page(FIRST))
        yield made


def sides(memory: GuestMemory) -> tuple[MemfdBacking, MemfdBacking]:
    assert isinstance(memory.shared, MemfdBacking)
    assert isinstance(memory.private, MemfdBacking)
    return memory.shared, memory.private


def test_share_and_unshare_keep_the_guests_bytes(memory: GuestMemory) -> None:
    converter = Converter(memory, RecordingScheme(memory))

    assert converter.convert(share(6, 3)) == 0
    assert memory.pread(3 * PAGE_SIZE, page(6)) == CONTENT[2 * PAGE_SIZE : 5 * PAGE_SIZE]
    assert converter.convert(unshare(6, 3)) == 0

    with pytest.raises(PrivateAccess):
        memory.pread(1, page(6))
    assert memory.shared.pread(len(CONTENT), page(FIRST)) == CONTENT
    assert memory.states() == [(pages(0, 64), PageState.PRIVATE)]


def test_unshare_of_everything_discards_only_what_has_another_side(memory: GuestMemory) -> None:
    shared, private = sides(memory)
    converter = Converter(memory, RecordingScheme(memory))
    assert converter.convert(share(0, 64)) == 0
    for number in (FIRST - 1, FIRST + COMMON, 63):
        memory.pwrite(b"x", page(number))

    assert converter.convert(unshare(0, 64)) == 0

    assert data_pages(shared.fd) == set(range(FIRST, FIRST + COMMON))
    assert data_pages(private.fd) == set()
    assert shared.pread(len(CONTENT), page(FIRST)) == CONTENT


def test_late_discard_spares_common_memory(memory: GuestMemory) -> None:
    class Later(Policy):
        def on_unshare(self, event: Event, view: View) -> Decision:
            return Defer(0.0)

    converter = Converter(memory, RecordingScheme(memory), Later(), clock=lambda: 1.0)
    assert converter.convert(share(0, 16)) == 0
    memory.pwrite(b"x", page(2))
    memory.pwrite(b"x", page(12))
    assert converter.convert(unshare(0, 16)) == 0

    converter.settle()

    assert data_pages(memory.shared.fd) == set(range(FIRST, FIRST + COMMON))
    assert memory.bytes_in(PageState.DEFERRED) == 0
