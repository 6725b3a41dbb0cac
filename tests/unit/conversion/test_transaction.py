"""The conversion transaction when all goes well: rule 3, states, counts, the policy's view."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.conversion import Answering, RecordingScheme, share, tally, unshare
from tests.support.memory import (
    HOLE_END,
    SPLIT_RAM,
    data_pages,
    guest_memory,
    page,
    pages,
    pattern,
)
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.guest_memory import GuestMemory, PageState, Residency
from vmm.policy import Allow, Event, Policy


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 pages, 32..63 private, both sides full wherever their state lets them be."""
    with guest_memory(pages(32, 32)) as made:
        assert made.private is not None
        made.pwrite(pattern(page(32)), 0)
        made.private.pwrite(pattern(page(32)), page(32))
        yield made


@pytest.fixture
def scheme(memory: GuestMemory) -> RecordingScheme:
    return RecordingScheme(memory)


@pytest.fixture
def converter(memory: GuestMemory, scheme: RecordingScheme) -> Converter:
    return Converter(memory, scheme, Policy())


def private_pages(memory: GuestMemory) -> set[int]:
    assert memory.private is not None
    return data_pages(memory.private.fd)


def test_share_makes_pages_shared_and_discards_the_private_side(
    memory: GuestMemory, scheme: RecordingScheme, converter: Converter
) -> None:
    answer = converter.convert(share(40, 4))

    assert answer == 0
    assert memory.states(pages(40, 4)) == [(pages(40, 4), PageState.SHARED)]
    assert private_pages(memory) == set(range(32, 64)) - {40, 41, 42, 43}
    assert memory.residency() == Residency(page(28), page(32))
    assert scheme.calls == ["apply share [0x28000, 0x2c000)"]
    assert tally(converter, Kind.SHARE) == {"calls": 1, "bytes": page(4), "denied": 0, "failed": 0}


def test_share_leaves_what_the_guest_wrote_on_the_shared_side_before(
    memory: GuestMemory, converter: Converter
) -> None:
    """Linux copies early pages to the plain alias and shares them afterwards."""
    memory.shared.pwrite(b"copied by the guest", page(40))

    converter.convert(share(40, 1))

    assert memory.pread(19, page(40)) == b"copied by the guest"


def test_unshare_makes_pages_private_and_discards_the_shared_side(
    memory: GuestMemory, converter: Converter
) -> None:
    answer = converter.convert(unshare(4, 8))

    assert answer == 0
    assert memory.states(pages(4, 8)) == [(pages(4, 8), PageState.PRIVATE)]
    assert data_pages(memory.shared.fd) == set(range(32)) - set(range(4, 12))
    assert memory.shared.pread(page(8), page(4)) == bytes(page(8))
    assert memory.residency() == Residency(page(32), page(24))
    assert tally(converter, Kind.UNSHARE)["bytes"] == page(8)


def test_round_trip_brings_nothing_old_back(memory: GuestMemory, converter: Converter) -> None:
    for request in (unshare(4, 8), share(4, 8), share(40, 4), unshare(40, 4)):
        assert converter.convert(request) == 0

    assert memory.private is not None
    assert memory.pread(page(8), page(4)) == bytes(page(8))
    assert memory.private.pread(page(4), page(40)) == bytes(page(4))


@pytest.mark.parametrize(
    ("request_", "changed"),
    [
        (share(0, 4), 0),
        (unshare(40, 4), 0),
        (share(30, 4), 2),
        (unshare(30, 4), 2),
        (share(0, 64), 32),
        (unshare(0, 64), 32),
    ],
    ids=lambda value: str(getattr(value, "kind", value)),
)
def test_bytes_counted_are_the_bytes_changed(
    memory: GuestMemory, converter: Converter, request_: ConversionRequest, changed: int
) -> None:
    assert converter.convert(request_) == 0

    assert tally(converter, request_.kind) == {
        "calls": 1,
        "bytes": page(changed),
        "denied": 0,
        "failed": 0,
    }
    target = PageState.SHARED if request_.kind is Kind.SHARE else PageState.PRIVATE
    area = Range(request_.gpa, request_.pages * PAGE_SIZE)
    assert memory.states(area) == [(area, target)]


def test_conversion_of_pages_in_that_state_already_touches_nothing(
    memory: GuestMemory, scheme: RecordingScheme, converter: Converter
) -> None:
    before = memory.residency()

    assert converter.convert(share(0, 8)) == 0

    assert scheme.calls == []
    assert memory.residency() == before
    assert memory.pread(page(8), 0) == pattern(page(8))


def test_partly_shared_range_keeps_the_content_of_the_part_that_was_shared(
    memory: GuestMemory, converter: Converter
) -> None:
    converter.convert(share(28, 8))

    assert memory.pread(page(4), page(28)) == pattern(page(32))[page(28) :]


def test_conversion_above_the_hole_works_like_one_below() -> None:
    with guest_memory(SPLIT_RAM[1], ram=SPLIT_RAM) as memory:
        converter = Converter(memory, RecordingScheme(memory), Policy())

        answer = converter.convert(share(HOLE_END // PAGE_SIZE, 64))

        assert answer == 0
        assert memory.bytes_in(PageState.SHARED) == memory.ram_bytes


def test_policy_is_asked_once_with_the_validated_range_and_a_view(memory: GuestMemory) -> None:
    policy = Answering(Allow())

    Converter(memory, RecordingScheme(memory), policy).convert(
        ConversionRequest(Kind.UNSHARE, page(4), 2, 7, "port")
    )

    assert policy.asked == [Event(Kind.UNSHARE, pages(4, 2), 7, "port")]


def test_hook_matches_the_direction(memory: GuestMemory) -> None:
    class Noting(Policy):
        def __init__(self) -> None:
            self.asked: list[str] = []

        def on_share(self, event: Event, view: object) -> Allow:
            self.asked.append("share")
            return Allow()

        def on_unshare(self, event: Event, view: object) -> Allow:
            self.asked.append("unshare")
            return Allow()

    policy = Noting()
    converter = Converter(memory, RecordingScheme(memory), policy)

    converter.convert(share(40, 1))
    converter.convert(unshare(4, 1))

    assert policy.asked == ["share", "unshare"]


def test_kvm_is_told_before_the_losing_side_is_discarded(
    memory: GuestMemory, scheme: RecordingScheme, converter: Converter
) -> None:
    """A page must be nobody's rather than both's: the discard can't be undone, so it is last."""
    seen: list[set[int]] = []
    scheme.before_apply = lambda area, kind: seen.append(private_pages(memory) & {40})

    converter.convert(share(40, 1))

    assert seen == [{40}]
    assert 40 not in private_pages(memory)
