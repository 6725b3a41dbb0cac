"""Decisions beyond Allow and Deny, as the transaction carries them out: what the guest is told is
true, states are what they say, and a failure leaves everything as it was."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from kvm_bindings import KvmError
from tests.support.conversion import Answering, RecordingScheme, share, snapshot, tally, unshare
from tests.support.memory import data_pages, guest_memory, page, pages, pattern
from vmm.conversion.transaction import BUSY_SECONDS, RETRY_SECONDS, Converter
from vmm.core.errors import PrivateAccess
from vmm.core.events import FROM_HOST, NO_VCPU, Kind
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import (
    Allow,
    Convert,
    Decision,
    Defer,
    Event,
    Kill,
    Partial,
    Policy,
    PolicyError,
    PolicyKill,
    View,
)

SIZE = page(64)


class FlakyPunch(MemfdBacking):
    """A memfd that gives pages back only while `broken` is False."""

    broken = False

    def punch(self, offset: int, size: int) -> None:
        if self.broken:
            raise KvmError("fallocate", errno.ENOMEM, "PUNCH_HOLE")
        super().punch(offset, size)


@dataclass
class Bench:
    """64 pages, 32..63 private, both sides full; a clock that the test moves."""

    memory: GuestMemory
    shared: FlakyPunch
    private: FlakyPunch
    now: float = 100.0
    wakes: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = Answering(Allow())
        self.scheme = RecordingScheme(self.memory)
        self.converter = Converter(
            self.memory, self.scheme, self.policy, clock=lambda: self.now, wake_at=self.wakes.append
        )

    def answer(self, decision: Decision) -> None:
        self.policy.answer = decision

    def states(self, first: int, count: int) -> list[PageState]:
        return [state for _, state in self.memory.states(pages(first, count))]


@pytest.fixture
def bench() -> Iterator[Bench]:
    shared, private = FlakyPunch(SIZE), FlakyPunch(SIZE)
    with guest_memory(pages(32, 32), shared=shared, private_backing=private) as memory:
        memory.pwrite(pattern(page(32)), 0)
        private.pwrite(pattern(page(32)), page(32))
        yield Bench(memory, shared, private)


# -- Partial --------------------------------------------------------------------------------------


def test_partial_converts_the_part_and_tells_the_guest_that_it_is_not_all(bench: Bench) -> None:
    bench.answer(Partial(pages(40, 2)))

    assert bench.converter.convert(share(40, 8)) == -errno.EAGAIN

    assert bench.memory.states(pages(40, 8)) == [
        (pages(40, 2), PageState.SHARED), (pages(42, 6), PageState.PRIVATE),
    ]  # fmt: skip
    assert data_pages(bench.private.fd) == set(range(32, 64)) - {40, 41}
    assert tally(bench.converter, Kind.SHARE)["bytes"] == page(2)
    assert bench.converter.refinements.partial == 1


def test_partial_that_completes_the_range_answers_0(bench: Bench) -> None:
    bench.answer(Partial(pages(32, 4)))

    assert bench.converter.convert(share(30, 6)) == 0

    assert bench.converter.refinements.partial == 0


def test_partial_with_an_errno_of_its_own_answers_it(bench: Bench) -> None:
    bench.answer(Partial(pages(40, 1), errno.ENOSPC))

    assert bench.converter.convert(share(40, 2)) == -errno.ENOSPC


def test_partial_whose_step_fails_changes_nothing(bench: Bench) -> None:
    bench.answer(Partial(pages(40, 1)))
    bench.private.broken = True
    before = snapshot(bench.memory, bench.scheme)

    assert bench.converter.convert(share(40, 2)) == -errno.ENOMEM

    assert snapshot(bench.memory, bench.scheme) == before
    assert tally(bench.converter, Kind.SHARE) == {"calls": 1, "bytes": 0, "denied": 0, "failed": 1}


@pytest.mark.parametrize(
    "decision",
    [Partial(pages(41, 2)), Convert(pages(40, 1)), Defer(1.0), Convert(pages(40, 90))],
    ids=repr,
)
def test_decision_that_does_not_fit_a_share_is_the_policys_fault(
    bench: Bench, decision: Decision
) -> None:
    bench.answer(decision)
    before = snapshot(bench.memory, bench.scheme)

    with pytest.raises(PolicyError, match="polic"):
        bench.converter.convert(share(40, 2))

    assert snapshot(bench.memory, bench.scheme) == before


# -- Kill -----------------------------------------------------------------------------------------


def test_kill_raises_its_reason_and_changes_nothing(bench: Bench) -> None:
    bench.answer(Kill("enough"))
    before = snapshot(bench.memory, bench.scheme)

    with pytest.raises(PolicyKill, match=r"^policy Answering: enough$"):
        bench.converter.convert(share(40, 2))

    assert snapshot(bench.memory, bench.scheme) == before
    assert tally(bench.converter, Kind.SHARE)["denied"] == 1


# -- Defer ----------------------------------------------------------------------------------------


def test_defer_answers_0_and_the_pages_say_what_they_are(bench: Bench) -> None:
    bench.answer(Defer(105.0))

    assert bench.converter.convert(unshare(4, 4)) == 0

    assert bench.states(4, 4) == [PageState.DEFERRED]
    assert data_pages(bench.shared.fd) >= {4, 5, 6, 7}, "the host's side is still there"
    assert [call.split()[0] for call in bench.scheme.calls] == ["apply"], "KVM knows at once"
    with pytest.raises(PrivateAccess, match="is deferred"):
        bench.memory.pread(1, page(4))
    assert tally(bench.converter, Kind.UNSHARE)["bytes"] == page(4)
    assert bench.wakes == [105.0]


def test_deferred_pages_are_discarded_when_due_and_not_before(bench: Bench) -> None:
    bench.answer(Defer(105.0))
    bench.converter.convert(unshare(4, 4))

    bench.now = 104.9
    bench.converter.settle()
    assert bench.states(4, 4) == [PageState.DEFERRED]

    bench.now = 105.0
    bench.converter.settle()
    assert bench.states(4, 4) == [PageState.PRIVATE]
    assert data_pages(bench.shared.fd) == set(range(32)) - {4, 5, 6, 7}
    assert tally(bench.converter, Kind.UNSHARE)["bytes"] == page(4), "counted once"


def test_defer_leaves_private_parts_of_its_range_private(bench: Bench) -> None:
    bench.answer(Defer(105.0))

    bench.converter.convert(unshare(30, 4))

    assert bench.states(30, 4) == [PageState.DEFERRED, PageState.PRIVATE]
    assert bench.converter.refinements.deferred_bytes == page(2)


@pytest.mark.parametrize("keep", [False, True])
def test_share_cancels_a_deferral_and_only_keep_brings_the_content_back(
    bench: Bench, keep: bool
) -> None:
    bench.answer(Defer(105.0, keep=keep))
    bench.converter.convert(unshare(4, 4))
    bench.private.pwrite(b"the guest's own", page(5))
    bench.answer(Allow())

    assert bench.converter.convert(share(4, 2)) == 0

    old = pattern(page(32))[page(4) : page(6)]
    assert bench.memory.pread(page(2), page(4)) == (old if keep else bytes(page(2)))
    assert data_pages(bench.private.fd) & {4, 5} == set()
    assert bench.converter.refinements.reclaimed_bytes == page(2)
    bench.now = 200.0
    bench.converter.settle()
    assert bench.states(4, 4) == [PageState.SHARED, PageState.PRIVATE]
    assert data_pages(bench.shared.fd) & {6, 7} == set()


def test_failed_share_of_deferred_pages_leaves_them_deferred_and_due(bench: Bench) -> None:
    bench.answer(Defer(105.0, keep=True))
    bench.converter.convert(unshare(4, 4))
    bench.answer(Allow())
    bench.private.broken = True
    before = snapshot(bench.memory, bench.scheme)

    assert bench.converter.convert(share(4, 4)) == -errno.ENOMEM

    assert snapshot(bench.memory, bench.scheme) == before
    bench.now = 105.0
    bench.converter.settle()
    assert bench.states(4, 4) == [PageState.PRIVATE]


def test_failed_unshare_across_deferred_pages_reverts_only_what_was_shared(bench: Bench) -> None:
    bench.answer(Defer(105.0))
    bench.converter.convert(unshare(4, 2))
    bench.answer(Allow())
    bench.shared.broken = True
    before = snapshot(bench.memory, bench.scheme)

    assert bench.converter.convert(unshare(4, 4)) == -errno.ENOMEM

    assert snapshot(bench.memory, bench.scheme) == before
    assert bench.states(4, 4) == [PageState.DEFERRED, PageState.SHARED]


def test_allowed_unshare_of_deferred_pages_discards_them_now(bench: Bench) -> None:
    bench.answer(Defer(105.0))
    bench.converter.convert(unshare(4, 4))
    bench.answer(Allow())

    assert bench.converter.convert(unshare(4, 4)) == 0

    assert bench.states(4, 4) == [PageState.PRIVATE]
    assert data_pages(bench.shared.fd) & {4, 5, 6, 7} == set()
    assert tally(bench.converter, Kind.UNSHARE)["bytes"] == page(4)


def test_late_discard_that_fails_is_tried_again(bench: Bench) -> None:
    bench.answer(Defer(105.0))
    bench.converter.convert(unshare(4, 4))
    bench.now, bench.shared.broken = 106.0, True

    bench.converter.settle()

    assert bench.states(4, 4) == [PageState.DEFERRED]
    assert bench.converter.refinements.discards_failed == 1
    assert bench.wakes == [105.0, 106.0 + RETRY_SECONDS]
    bench.now, bench.shared.broken = 106.0 + RETRY_SECONDS, False
    bench.converter.settle()
    assert bench.states(4, 4) == [PageState.PRIVATE]


def test_wake_is_asked_for_only_when_it_gets_earlier(bench: Bench) -> None:
    for first, until in ((0, 105.0), (2, 107.0), (4, 103.0), (6, math.inf)):
        bench.answer(Defer(until))
        bench.converter.convert(unshare(first, 1))

    assert bench.wakes == [105.0, 103.0]
    bench.now = 103.0
    bench.converter.settle()
    assert bench.wakes == [105.0, 103.0, 105.0]


def test_late_discard_is_put_off_while_a_policy_does_not_answer(bench: Bench) -> None:
    """The device loop settles: were it to wait, nothing could end the run."""
    asked, over = threading.Event(), threading.Event()

    class Undecided(Policy):
        def on_unshare(self, event: Event, view: View) -> Decision:
            return Defer(105.0)

        def on_share(self, event: Event, view: View) -> Decision:
            asked.set()
            over.wait()
            return Allow()

    converter = Converter(
        bench.memory, bench.scheme, Undecided(), clock=lambda: bench.now, wake_at=bench.wakes.append
    )
    converter.convert(unshare(4, 1))
    bench.now = 106.0
    thread = threading.Thread(target=converter.convert, args=(share(40, 1),), daemon=True)
    thread.start()
    try:
        assert asked.wait(10)

        converter.settle()

        assert converter.undecided == f"policy Undecided: on_share for {pages(40, 1)}"
        assert bench.states(4, 1) == [PageState.DEFERRED]
        assert bench.wakes == [105.0, 106.0 + BUSY_SECONDS]
    finally:
        over.set()
        thread.join()
    converter.settle()
    assert converter.undecided is None
    assert bench.states(4, 1) == [PageState.PRIVATE]


def test_hosts_conversion_is_asked_about_and_counted_as_any_other(bench: Bench) -> None:
    policy = Answering(Allow())
    converter = Converter(bench.memory, bench.scheme, policy)

    answers = [
        converter.convert_for_host(Kind.SHARE, page(40), page(2)),
        converter.convert_for_host(Kind.UNSHARE, page(1 << 20), page(1)),
    ]

    assert answers == [0, -errno.EINVAL]
    assert policy.asked == [Event(Kind.SHARE, pages(40, 2), NO_VCPU, FROM_HOST)]
    assert bench.states(40, 2) == [PageState.SHARED]
    assert tally(converter, Kind.UNSHARE)["failed"] == 1


def test_hosts_conversion_does_not_wait_for_a_policy_that_does_not_answer(bench: Bench) -> None:
    asked, over = threading.Event(), threading.Event()

    class Undecided(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            asked.set()
            over.wait()
            return Allow()

    converter = Converter(bench.memory, bench.scheme, Undecided())
    thread = threading.Thread(target=converter.convert, args=(share(40, 1),), daemon=True)
    thread.start()
    try:
        assert asked.wait(10)

        assert converter.convert_for_host(Kind.UNSHARE, page(1), page(1)) == -errno.EBUSY
    finally:
        over.set()
        thread.join()
    assert tally(converter, Kind.UNSHARE)["calls"] == 0


# -- Convert --------------------------------------------------------------------------------------


def test_convert_takes_deferred_neighbours_along_in_one_discard(bench: Bench) -> None:
    bench.answer(Defer(105.0))
    bench.converter.convert(unshare(4, 4))
    bench.answer(Convert(pages(4, 8)))

    assert bench.converter.convert(unshare(8, 4)) == 0

    assert bench.states(4, 8) == [PageState.PRIVATE]
    assert data_pages(bench.shared.fd) & set(range(4, 12)) == set()
    assert tally(bench.converter, Kind.UNSHARE)["bytes"] == page(8)
    assert bench.converter.refinements.widened == 1


def test_convert_of_pages_that_the_guest_still_shares_is_the_policys_fault(bench: Bench) -> None:
    bench.answer(Convert(pages(4, 8)))
    before = snapshot(bench.memory, bench.scheme)

    with pytest.raises(PolicyError, match=r"has not asked to unshare.*which is shared"):
        bench.converter.convert(unshare(8, 4))

    assert snapshot(bench.memory, bench.scheme) == before


# -- no hook --------------------------------------------------------------------------------------


def test_view_has_the_counts_and_the_clock(bench: Bench) -> None:
    bench.converter.convert(share(40, 4))

    assert bench.converter.view.now == 100.0
    assert bench.converter.view.counts(Kind.SHARE) == (1, page(4), 0, 0)


def test_policy_without_the_hook_is_not_asked(bench: Bench) -> None:
    class ShareOnly(Policy):
        on_share = Answering.on_share
        asked: list[object] = []
        answer = Allow()

    policy = ShareOnly()
    converter = Converter(bench.memory, bench.scheme, policy, Policy())

    converter.convert(unshare(4, 1))
    converter.convert(share(40, 1))

    assert len(policy.asked) == 1
