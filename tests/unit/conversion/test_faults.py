"""Implicit conversions: an access to a page that is in the other state asks for the conversion."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.support.conversion import Answering, RecordingScheme, share, tally
from tests.support.memory import guest_memory, page, pages
from vmm.conversion.transaction import FRUITLESS_FAULTS, Converter
from vmm.core.events import FAULT, Kind
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Allow, Convert, Decision, Deny, Event, Partial, Policy, PolicyKill, View
from vmm.policy.decisions import Kill


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 pages, 32..63 private."""
    with guest_memory(pages(32, 32)) as made:
        yield made


class Faults(Answering):
    """Answers implicit conversions, and refuses what is asked for in any other way."""

    def on_fault(self, event: Event, view: View) -> Decision:
        return Answering.on_share(self, event, view)

    def on_share(self, event: Event, view: View) -> Decision:
        return Deny(errno.EPERM)

    on_unshare = on_share


def converter(memory: GuestMemory, *policies: Policy) -> Converter:
    return Converter(memory, RecordingScheme(memory), *policies)


def test_fault_converts_its_pages_and_the_guest_may_try_again(memory: GuestMemory) -> None:
    made = converter(memory)

    answers = [
        made.fault(Kind.SHARE, page(40), PAGE_SIZE, 0),
        made.fault(Kind.UNSHARE, page(2), 2 * PAGE_SIZE, 0),
    ]

    assert answers == [0, 0]
    assert memory.states(pages(40, 1)) == [(pages(40, 1), PageState.SHARED)]
    assert memory.states(pages(2, 2)) == [(pages(2, 2), PageState.PRIVATE)]
    assert tally(made, Kind.UNSHARE) == {"calls": 1, "bytes": 8192, "denied": 0, "failed": 0}


def test_fault_is_asked_about_by_its_own_hook(memory: GuestMemory) -> None:
    policy = Faults(Allow())

    answer = converter(memory, policy).fault(Kind.SHARE, page(40), PAGE_SIZE, 3)

    assert answer == 0
    assert policy.asked == [Event(Kind.SHARE, pages(40, 1), 3, FAULT)]


def test_fault_does_not_get_around_a_policy_without_on_fault(memory: GuestMemory) -> None:
    policy = Answering(Deny(errno.EPERM))

    answer = converter(memory, Policy(), policy).fault(Kind.SHARE, page(40), PAGE_SIZE, 0)

    assert answer == -errno.EPERM
    assert [event.doorbell for event in policy.asked] == [FAULT]
    assert memory.states(pages(40, 1)) == [(pages(40, 1), PageState.PRIVATE)]


def test_on_fault_is_not_asked_about_a_request(memory: GuestMemory) -> None:
    policy = Faults(Allow())

    answer = converter(memory, policy).hooks.decide(
        Kind.SHARE, pages(40, 1), 0, "hypercall", converter(memory).view
    )

    assert answer == Deny(errno.EPERM)
    assert policy.asked == []


def test_fault_takes_the_decisions_that_requests_take(memory: GuestMemory) -> None:
    area = pages(40, 2)
    half = converter(memory, Faults(Partial(pages(40, 1), errno.EAGAIN)))
    wide = converter(memory, Faults(Convert(pages(40, 3))))

    assert half.fault(Kind.SHARE, area.start, area.size, 0) == -errno.EAGAIN
    memory_before = memory.bytes_in(PageState.SHARED)
    assert memory_before == page(33)
    with pytest.raises(PolicyKill, match="enough"):
        converter(memory, Faults(Kill("enough"))).fault(Kind.SHARE, area.start, area.size, 0)
    assert wide.fault(Kind.UNSHARE, page(40), PAGE_SIZE, 0) == 0


@pytest.mark.parametrize("gpa", [page(64), page(40) + 1, page(63) + 8])
def test_fault_outside_ram_or_off_a_page_is_refused(memory: GuestMemory, gpa: int) -> None:
    made = converter(memory)

    assert made.fault(Kind.SHARE, gpa, PAGE_SIZE, 0) == -errno.EINVAL
    assert tally(made, Kind.SHARE)["failed"] == 1


def test_fault_where_the_scheme_has_no_implicit_conversions_asks_for_nothing(
    memory: GuestMemory,
) -> None:
    policy = Faults(Allow())
    made = converter(memory, policy)
    made._scheme.converts_on_fault = False

    assert made.fault(Kind.SHARE, page(40), PAGE_SIZE, 0) == -errno.EOPNOTSUPP
    assert policy.asked == []
    assert tally(made, Kind.SHARE)["calls"] == 0


def test_vcpu_that_faults_for_ever_on_a_page_that_is_as_it_wants_is_given_up(
    memory: GuestMemory,
) -> None:
    made = converter(memory)
    answers = [made.fault(Kind.SHARE, page(0), PAGE_SIZE, 0) for _ in range(FRUITLESS_FAULTS + 1)]

    assert set(answers[:-1]) == {0}
    assert answers[-1] == -errno.EFAULT


def test_fruitless_faults_count_in_a_row_and_for_each_vcpu(memory: GuestMemory) -> None:
    made = converter(memory)
    for number in range(3 * FRUITLESS_FAULTS):
        vcpu = number % 2
        first = number // 2 % 2  # never the same page twice in a row
        assert made.fault(Kind.SHARE, page(first), PAGE_SIZE, vcpu) == 0


def test_fault_that_another_vcpu_has_overtaken_does_not_undo_its_conversion(
    memory: GuestMemory,
) -> None:
    """vCPU 1 touches a private page; before its exit arrives, vCPU 0 has shared the page."""
    made = converter(memory)
    made.convert(share(40, 1))

    assert made.fault(Kind.UNSHARE, page(40), PAGE_SIZE, 1) == 0
    assert memory.states(pages(40, 1)) == [(pages(40, 1), PageState.SHARED)]

    # It touches the page again, and means it.
    assert made.fault(Kind.UNSHARE, page(40), PAGE_SIZE, 1) == 0
    assert memory.states(pages(40, 1)) == [(pages(40, 1), PageState.PRIVATE)]


def test_own_conversions_do_not_overtake_a_vcpus_fault(memory: GuestMemory) -> None:
    made = converter(memory)
    made.convert(share(40, 1))

    assert made.fault(Kind.UNSHARE, page(40), PAGE_SIZE, 0) == 0

    assert memory.states(pages(40, 1)) == [(pages(40, 1), PageState.PRIVATE)]


def test_each_conversion_of_another_vcpu_makes_a_fault_doubtful_again(memory: GuestMemory) -> None:
    made = converter(memory)
    for number in (40, 41):
        made.convert(share(number, 1))
        made.fault(Kind.UNSHARE, page(number), PAGE_SIZE, 1)

    assert memory.states(pages(40, 2)) == [(pages(40, 2), PageState.SHARED)]
