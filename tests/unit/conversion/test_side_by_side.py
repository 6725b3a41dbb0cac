"""Conversions by several vCPUs: of different pages side by side, of the same pages in order, and
the policies are asked one at a time. Events decide what comes when, never a clock."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import pytest

from kvm_bindings import KvmError
from tests.support.conversion import Answering, RecordingScheme, share, tally, unshare
from tests.support.memory import (
    Background,
    GatedBacking,
    data_pages,
    guest_memory,
    page,
    pages,
    pattern,
    told_when_waiting,
)
from vmm.conversion.schemes.remap import RemapScheme
from vmm.conversion.transaction import Converter
from vmm.core.errors import PrivateAccess
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import (
    Allow,
    Convert,
    Decision,
    Defer,
    Deny,
    Event,
    Partial,
    Policy,
    View,
)
from vmm.policy.builtin import Quota

FOREVER = threading.TIMEOUT_MAX


class Stops:
    """Conversions stop in their scheme's step until the test lets them go, page by page."""

    def __init__(self, scheme: RecordingScheme, *first_pages: int) -> None:
        self._reached = {page(number): threading.Event() for number in first_pages}
        self._go_on = {page(number): threading.Event() for number in first_pages}
        scheme.before_apply = self._stop

    def _stop(self, area: Range, kind: Kind) -> None:
        if area.start in self._reached:
            self._reached[area.start].set()
            assert self._go_on[area.start].wait(30), "nobody let it go"

    def await_one_at(self, number: int) -> None:
        assert self._reached[page(number)].wait(30), "no conversion came as far as that"

    def let_go(self, number: int) -> None:
        self._go_on[page(number)].set()


class Bench:
    """64 pages, 32..63 private."""

    def __init__(self, memory: GuestMemory, *policies: Policy) -> None:
        self.memory = memory
        self.scheme = RecordingScheme(memory)
        self.now = 100.0
        self.converter = Converter(
            memory, self.scheme, *policies, quiesce_timeout=FOREVER, clock=lambda: self.now
        )

    def start(self, request: ConversionRequest) -> Background:
        return Background(lambda: self.converter.convert(request))

    def await_waiting(self, count: int) -> None:
        """Until so many requests wait for others."""
        with self.converter._ended:
            arrived = self.converter._ended.wait_for(lambda: self.converter._waiting == count, 30)
        assert arrived, f"{self.converter._waiting} requests wait, not {count}"


def waiting_told(converter: Converter) -> None:
    """Let `await_waiting` hear of it."""
    wait_for = converter._ended.wait_for

    def told(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        converter._ended.notify_all()
        return wait_for(predicate, timeout)

    converter._ended.wait_for = told  # type: ignore[method-assign,assignment]


@pytest.fixture
def backing() -> GatedBacking:
    return GatedBacking(page(64))


@pytest.fixture
def memory(backing: GatedBacking) -> Iterator[GuestMemory]:
    with guest_memory(pages(32, 32), shared=backing) as made:
        yield made
        backing.gate.set()


@pytest.fixture
def bench(memory: GuestMemory) -> Bench:
    made = Bench(memory)
    waiting_told(made.converter)
    return made


# -- different pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("policies", [(), (Policy(),), (Answering(Allow()),)], ids=len)
def test_conversion_does_not_wait_for_another_pages_device(
    memory: GuestMemory, backing: GatedBacking, policies: tuple[Policy, ...]
) -> None:
    bench = Bench(memory, *policies)
    access = Background(lambda: memory.pread(1, page(4)))
    backing.await_arrivals()
    quiescing = told_when_waiting(memory)
    first = bench.start(unshare(4, 1))
    assert quiescing.wait(30)

    assert bench.converter.convert(unshare(8, 1)) == 0

    assert memory.states(pages(4, 1)) == [(pages(4, 1), PageState.CONVERTING)]
    assert [call.split()[0] for call in bench.scheme.calls] == ["apply"]
    backing.gate.set()
    access.result()
    assert first.result() == 0
    assert tally(bench.converter, Kind.UNSHARE)["bytes"] == page(2)


def test_conversion_does_not_wait_for_another_pages_step(bench: Bench) -> None:
    stops = Stops(bench.scheme, 40)
    first = bench.start(share(40, 2))
    stops.await_one_at(40)

    assert bench.converter.convert(share(50, 2)) == 0

    stops.let_go(40)
    assert first.result() == 0
    assert bench.scheme.shared == [pages(0, 32), pages(40, 2), pages(50, 2)]


def test_failed_conversion_beside_another_takes_back_its_own(bench: Bench) -> None:
    stops = Stops(bench.scheme, 40, 44)

    def fail(offset: int, size: int) -> None:
        if offset == page(40):
            raise KvmError("fallocate", errno.ENOMEM)

    bench.memory.private.punch = fail  # type: ignore[union-attr,method-assign]
    first, second = bench.start(share(40, 4)), bench.start(share(44, 4))
    stops.await_one_at(40)
    stops.await_one_at(44)

    stops.let_go(40)
    assert first.result() == -errno.ENOMEM
    assert bench.memory.states(pages(36, 12)) == [
        (pages(36, 8), PageState.PRIVATE), (pages(44, 4), PageState.CONVERTING),
    ]  # fmt: skip
    stops.let_go(44)

    assert second.result() == 0
    assert bench.scheme.shared == [pages(0, 32), pages(44, 4)]
    assert tally(bench.converter, Kind.SHARE) == {
        "calls": 2, "bytes": page(4), "denied": 0, "failed": 1,
    }  # fmt: skip


def test_scheme_that_takes_one_at_a_time_gets_one_at_a_time(memory: GuestMemory) -> None:
    assert RemapScheme.side_by_side is False
    RecordingScheme.side_by_side = False
    try:
        bench = Bench(memory)
    finally:
        RecordingScheme.side_by_side = True
    stops = Stops(bench.scheme, 40)
    first = bench.start(share(40, 1))
    stops.await_one_at(40)
    quiesced, quiesce = threading.Event(), memory.quiesce

    def telling(area: Range, timeout: float) -> bool:
        result = quiesce(area, timeout)
        quiesced.set()
        return result

    memory.quiesce = telling  # type: ignore[method-assign]
    second = bench.start(share(50, 1))
    assert quiesced.wait(30), "waiting for devices is no part of its turn"
    assert len(bench.scheme.calls) == 1

    stops.let_go(40)

    assert (first.result(), second.result()) == (0, 0)
    assert len(bench.scheme.calls) == 2


# -- the same pages -------------------------------------------------------------------------------


def test_conversions_of_the_same_pages_come_one_after_another(bench: Bench) -> None:
    stops = Stops(bench.scheme, 40)
    first = bench.start(share(40, 4))
    stops.await_one_at(40)
    second = bench.start(unshare(42, 4))
    bench.await_waiting(1)

    assert len(bench.scheme.calls) == 1
    stops.let_go(40)

    assert (first.result(), second.result()) == (0, 0)
    assert bench.scheme.shared == [pages(0, 32), pages(40, 2)]
    assert tally(bench.converter, Kind.UNSHARE)["bytes"] == page(2)


def test_policy_is_asked_about_pages_only_when_nobody_is_at_them(memory: GuestMemory) -> None:
    seen: list[tuple[Range, list[PageState]]] = []

    class Looking(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            seen.append((event.area, [state for _, state in view.states(event.area)]))
            return Allow()

        on_unshare = on_share

    bench = Bench(memory, Looking())
    waiting_told(bench.converter)
    stops = Stops(bench.scheme, 40)
    first = bench.start(share(40, 2))
    stops.await_one_at(40)
    second = bench.start(unshare(40, 2))
    bench.await_waiting(1)
    assert len(seen) == 1

    stops.let_go(40)
    first.result()
    second.result()

    assert seen == [(pages(40, 2), [PageState.PRIVATE]), (pages(40, 2), [PageState.SHARED])]


def test_request_for_much_is_not_overtaken_for_ever_by_those_for_little(bench: Bench) -> None:
    stops = Stops(bench.scheme, 40, 32)
    little = bench.start(share(40, 1))
    stops.await_one_at(40)
    much = bench.start(share(32, 32))
    bench.await_waiting(1)
    later = bench.start(unshare(50, 1))  # nobody is at page 50, but one waits for it
    bench.await_waiting(2)

    assert bench.converter.convert(unshare(8, 1)) == 0  # nobody waits for page 8
    stops.let_go(40)
    stops.await_one_at(32)
    stops.let_go(32)

    assert [each.result() for each in (little, much, later)] == [0, 0, 0]
    order = [call.rsplit(" ", 2)[0] for call in bench.scheme.calls]
    assert order == ["apply share", "apply unshare", "apply share", "apply unshare"]
    assert bench.scheme.shared == [pages(0, 8), pages(9, 23), pages(32, 18), pages(51, 13)] or (
        bench.scheme.shared == [pages(0, 8), pages(9, 41), pages(51, 13)]
    )
    assert bench.converter._turns == []


def test_refused_request_lets_those_behind_it_go_on(memory: GuestMemory) -> None:
    class OnlyUnshares(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            return Deny(errno.EPERM) if event.area.size > page(1) else Allow()

    bench = Bench(memory, OnlyUnshares())
    waiting_told(bench.converter)
    stops = Stops(bench.scheme, 40)
    first = bench.start(share(40, 1))
    stops.await_one_at(40)
    refused = bench.start(share(38, 8))
    bench.await_waiting(1)
    behind = bench.start(unshare(38, 1))
    bench.await_waiting(2)

    stops.let_go(40)

    assert (first.result(), refused.result(), behind.result()) == (0, -errno.EPERM, 0)


# -- policies -------------------------------------------------------------------------------------


def test_policy_is_asked_about_other_pages_while_a_conversion_waits(
    memory: GuestMemory, backing: GatedBacking
) -> None:
    policy = Answering(Allow())
    bench = Bench(memory, policy)
    access = Background(lambda: memory.pread(1, page(4)))
    backing.await_arrivals()
    quiescing = told_when_waiting(memory)
    first = bench.start(unshare(4, 1))
    assert quiescing.wait(30)
    policy.answer = Deny(errno.EPERM)

    assert bench.converter.convert(unshare(8, 1)) == -errno.EPERM

    assert [event.area for event in policy.asked] == [pages(4, 1), pages(8, 1)]
    backing.gate.set()
    access.result()
    assert first.result() == 0


def test_bound_holds_while_what_was_allowed_is_under_way(memory: GuestMemory) -> None:
    """32 pages are shared, and 40 may be: 6 more are on their way."""
    bench = Bench(memory, Quota(page(40)))
    stops = Stops(bench.scheme, 40)
    first = bench.start(share(40, 6))
    stops.await_one_at(40)

    assert bench.converter.convert(share(50, 3)) == -errno.EACCES
    assert bench.converter.convert(share(50, 2)) == 0

    stops.let_go(40)
    assert first.result() == 0
    assert memory.bytes_in(PageState.SHARED) == page(40)


def test_pages_that_become_private_count_until_they_are(memory: GuestMemory) -> None:
    bench = Bench(memory, Quota(page(32)))
    stops = Stops(bench.scheme, 4)
    first = bench.start(unshare(4, 6))
    stops.await_one_at(4)

    assert bench.converter.convert(share(50, 1)) == -errno.EACCES

    stops.let_go(4)
    first.result()
    assert bench.converter.convert(share(50, 1)) == 0


def test_convert_waits_for_its_neighbours_conversion(memory: GuestMemory) -> None:
    answers: list[Decision] = [Defer(200.0), Allow(), Convert(pages(4, 4))]

    class Widening(Policy):
        def on_unshare(self, event: Event, view: View) -> Decision:
            return answers.pop(0)

    bench = Bench(memory, Widening())
    waiting_told(bench.converter)
    bench.converter.convert(unshare(4, 2))
    stops = Stops(bench.scheme, 6)
    first = bench.start(unshare(6, 1))
    stops.await_one_at(6)
    wide = bench.start(unshare(7, 1))
    bench.await_waiting(1)

    stops.let_go(6)

    assert (first.result(), wide.result()) == (0, 0)
    assert memory.states(pages(4, 4)) == [(pages(4, 4), PageState.PRIVATE)]


IN_HASTE = [Defer(200.0), Partial(pages(4, 1)), Convert(pages(4, 2)), Allow()]


@pytest.mark.parametrize("answer", IN_HASTE, ids=repr)
@pytest.mark.parametrize("haste_first", [True, False])
def test_haste_of_one_policy_counts_beside_what_another_says(
    memory: GuestMemory, backing: GatedBacking, answer: Decision, haste_first: bool
) -> None:
    stack = [Answering(Allow(patience=0)), Answering(answer)]
    bench = Bench(memory, *(stack if haste_first else stack[::-1]))
    access = Background(lambda: memory.pread(1, page(4)))
    backing.await_arrivals()

    assert bench.converter.convert(unshare(4, 2)) == -errno.EBUSY  # else it would wait for ever

    assert bench.scheme.calls == []
    backing.gate.set()
    access.result()


@pytest.mark.parametrize("later", [None, Defer(200.0)])
def test_part_is_put_off_where_its_policy_or_another_says_so(
    memory: GuestMemory, later: Defer | None
) -> None:
    half = Partial(pages(4, 1), later=later)
    bench = Bench(memory, Answering(half), *([] if later else [Answering(Defer(200.0))]))

    assert bench.converter.convert(unshare(4, 2)) == -errno.EAGAIN

    assert memory.states(pages(4, 2)) == [
        (pages(4, 1), PageState.DEFERRED), (pages(5, 1), PageState.SHARED),
    ]  # fmt: skip
    bench.now = 200.0
    bench.converter.settle()
    assert memory.states(pages(4, 1)) == [(pages(4, 1), PageState.PRIVATE)]


# -- the device loop's ----------------------------------------------------------------------------


def test_hosts_conversion_of_pages_that_are_being_converted_is_refused_at_once(
    bench: Bench,
) -> None:
    stops = Stops(bench.scheme, 40)
    first = bench.start(share(40, 2))
    stops.await_one_at(40)

    answers = [
        bench.converter.convert_for_host(Kind.UNSHARE, page(41), page(1)),
        bench.converter.convert_for_host(Kind.UNSHARE, page(8), page(1)),
    ]

    assert answers == [-errno.EBUSY, 0]
    stops.let_go(40)
    first.result()


def test_late_discard_leaves_pages_alone_that_are_being_shared(memory: GuestMemory) -> None:
    policy = Answering(Defer(105.0, keep=True))
    bench = Bench(memory, policy)
    memory.pwrite(b"kept", page(4))
    bench.converter.convert(unshare(4, 2))
    policy.answer = Allow()
    stops = Stops(bench.scheme, 4)
    sharing = bench.start(share(4, 1))
    stops.await_one_at(4)
    bench.now = 106.0

    bench.converter.settle()
    stops.let_go(4)

    assert sharing.result() == 0
    bench.now = 107.0
    bench.converter.settle()
    assert memory.states(pages(4, 2)) == [
        (pages(4, 1), PageState.SHARED), (pages(5, 1), PageState.PRIVATE),
    ]  # fmt: skip
    assert os_pread(memory, 4) == b"kept"


def test_late_discard_leaves_pages_alone_that_have_just_been_shared(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share ends between the look at what is due and the discard."""
    policy = Answering(Defer(105.0, keep=True))
    bench = Bench(memory, policy)
    memory.pwrite(b"kept", page(4))
    bench.converter.convert(unshare(4, 2))
    policy.answer = Allow()
    stops = Stops(bench.scheme, 4)
    sharing = bench.start(share(4, 1))
    stops.await_one_at(4)
    bench.now = 106.0
    discard = bench.converter._discard_late

    def after_the_share(*arguments: Any) -> None:
        stops.let_go(4)
        assert sharing.result() == 0
        discard(*arguments)

    monkeypatch.setattr(bench.converter, "_discard_late", after_the_share)

    bench.converter.settle()

    assert memory.states(pages(4, 2)) == [
        (pages(4, 1), PageState.SHARED), (pages(5, 1), PageState.PRIVATE),
    ]  # fmt: skip
    assert os_pread(memory, 4) == b"kept"


def os_pread(memory: GuestMemory, number: int) -> bytes:
    assert isinstance(memory.shared, GatedBacking)
    memory.shared.gate.set()
    return memory.pread(4, page(number))


# -- everything at once ---------------------------------------------------------------------------

TOTAL, VCPUS, ROUNDS = 64, 4, 250


class Moody(Policy):
    """Any decision that fits; finds out when it is asked twice at once."""

    def __init__(self) -> None:
        self._chance = random.Random(5)
        self._asked = threading.Lock()
        self.at_once = 0

    def on_share(self, event: Event, view: View) -> Decision:
        if not self._asked.acquire(blocking=False):
            self.at_once += 1
            return Allow()
        try:
            states = {state for _, state in view.states(event.area)}
            self.at_once += PageState.CONVERTING in states
            return self._decision(event, view)
        finally:
            self._asked.release()

    on_unshare = on_share

    def _decision(self, event: Event, view: View) -> Decision:
        half = Range(event.area.start, max(event.area.size // 2 & ~4095, 4096))
        match self._chance.randrange(8):
            case 0:
                return Deny(errno.EPERM)
            case 1:
                return Partial(half)
            case 2 | 3 if event.kind is Kind.UNSHARE:
                keep = self._chance.random() < 0.5
                return Defer(view.now + self._chance.randrange(3), keep=keep)
            case 4 if event.kind is Kind.UNSHARE:
                before = view.states(Range(0, event.area.start))
                start = event.area.start
                if before and before[-1][1] is PageState.DEFERRED:
                    start = before[-1][0].start
                return Convert(Range(start, event.area.end - start))
        return Allow()


class Flaky(MemfdBacking):
    """Every 40th hole fails."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._holes = 0

    def punch(self, offset: int, size: int) -> None:
        self._holes += 1
        if self._holes % 40 == 0:
            raise KvmError("fallocate", errno.ENOMEM)
        super().punch(offset, size)


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("side_by_side", [True, False])
def test_all_decisions_from_four_vcpus_with_io_and_late_discards_add_up(side_by_side: bool) -> None:
    with guest_memory(
        pages(32, 32), shared=Flaky(page(TOTAL)), private_backing=Flaky(page(TOTAL))
    ) as memory:
        scheme, policy = RecordingScheme(memory), Moody()
        scheme.side_by_side = side_by_side
        clock = [0.0]
        converter = Converter(memory, scheme, policy, clock=lambda: clock[0])
        over = threading.Event()

        def convert(seed: int) -> set[int]:
            chance = random.Random(seed)
            answers = set()
            for _ in range(ROUNDS):
                first = chance.randrange(TOTAL)
                count = chance.randint(1, min(8, TOTAL - first))
                answers.add(converter.convert(chance.choice((share, unshare))(first, count)))
            return answers

        def do_io() -> None:
            chance = random.Random(7)
            while not over.is_set():
                try:
                    first, second = chance.randrange(TOTAL), chance.randrange(TOTAL)
                    memory.write_many([page(first), 64, page(second), 64], bytes(128))
                except PrivateAccess:
                    continue

        def settle() -> None:
            while not over.is_set():
                clock[0] += 0.01
                converter.settle()

        beside = [Background(do_io), Background(settle)]
        vcpus = [Background(partial(convert, seed)) for seed in range(VCPUS)]
        answers: set[object] = set()
        for vcpu in vcpus:
            answers |= cast(set[object], vcpu.result())
        over.set()
        for each in beside:
            each.result()

        assert answers == {0, -errno.EPERM, -errno.EAGAIN, -errno.ENOMEM}
        assert policy.at_once == 0
        counts = converter.accounting
        assert counts.share.calls + counts.unshare.calls == VCPUS * ROUNDS
        assert (
            memory.bytes_in(PageState.SHARED)
            == page(32) + counts.share.bytes - counts.unshare.bytes
        )
        for _ in range(5):  # some holes fail, and are tried again
            clock[0] += 10.0
            converter.settle()
        assert memory.bytes_in(PageState.DEFERRED) == 0
        assert converter._due is not None and len(converter._due) == 1
        assert memory.bytes_in(PageState.CONVERTING) == 0
        shared = {n for a, s in memory.states() if s is PageState.SHARED for n in numbers(a)}
        assert scheme.shared == [a for a, s in memory.states() if s is PageState.SHARED]
        assert data_pages(memory.shared.fd) <= shared
        assert memory._in_flight == {} and converter._turns == []


def numbers(area: Range) -> range:
    return range(area.start >> 12, area.end >> 12)


def test_bytes_that_the_guest_had_before_are_there_after_side_by_side(bench: Bench) -> None:
    """Neither of two that run at once discards a page of the other's."""
    private = bench.memory.private
    assert private is not None
    private.pwrite(pattern(page(8)), page(36))
    stops = Stops(bench.scheme, 40)
    first = bench.start(share(40, 1))
    stops.await_one_at(40)

    bench.converter.convert(share(42, 1))
    stops.let_go(40)
    first.result()

    assert data_pages(private.fd) == {36, 37, 38, 39, 41, 43}
