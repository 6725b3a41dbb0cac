"""The built-in policies over real guest memory, with a clock that the test moves."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.conversion import RecordingScheme, share, tally, unshare
from tests.support.memory import data_pages, guest_memory, page, pages
from vmm.conversion.transaction import Converter
from vmm.core.errors import AccessDenied
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Deny, End, Event, Policy, View
from vmm.policy.builtin import (
    AllowAll,
    Audit,
    Coalesce,
    DeferredDiscard,
    DenyAfterBoot,
    Hysteresis,
    KeepShared,
    LeastPrivilege,
    PageBudget,
    Quota,
    RateLimit,
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """64 pages, 32..63 private; the shared ones are full."""
    with guest_memory(pages(32, 32)) as made:
        made.pwrite(b"x" * page(32), 0)
        yield made


class Run:
    """A converter under one policy; `now` is its clock."""

    def __init__(self, memory: GuestMemory, policy: Policy) -> None:
        self.now = 100.0
        self.memory = memory
        scheme = RecordingScheme(memory)
        self.converter = Converter(memory, scheme, policy, clock=lambda: self.now)
        self.converter.hooks.boot(self.converter.view)

    def share(self, first: int, count: int = 1) -> int:
        return self.converter.convert(share(first, count))

    def unshare(self, first: int, count: int = 1) -> int:
        return self.converter.convert(unshare(first, count))

    def pages_in(self, state: PageState) -> int:
        return self.memory.bytes_in(state) // page(1)


def test_allow_all_allows_all(memory: GuestMemory) -> None:
    run = Run(memory, AllowAll())

    assert [run.share(40), run.unshare(40), run.unshare(0, 32)] == [0, 0, 0]


def test_deny_after_boot_refuses_shares_from_the_first_unshare_on(memory: GuestMemory) -> None:
    run = Run(memory, DenyAfterBoot())

    answers = [run.unshare(32, 32), run.share(40), run.unshare(0), run.share(41), run.unshare(1)]

    assert answers == [0, 0, 0, -errno.EACCES, 0]


def test_deny_after_boot_with_a_time_ignores_unshares_before_it(memory: GuestMemory) -> None:
    run = Run(memory, DenyAfterBoot(seconds=5))

    answers = [run.unshare(0), run.share(40)]
    run.now = 105.0

    assert [*answers, run.share(41)] == [0, 0, -errno.EACCES]


def test_quota_counts_what_is_shared_now_and_nothing_twice(memory: GuestMemory) -> None:
    run = Run(memory, Quota(page(34)))

    assert [run.share(40, 2), run.share(42), run.share(40, 2)] == [0, -errno.EACCES, 0]
    assert [run.unshare(0), run.share(42)] == [0, 0]


def test_rate_limit_lets_a_burst_through_and_then_the_rate(memory: GuestMemory) -> None:
    run = Run(memory, RateLimit(per_second=2, burst=2))

    assert [run.share(40 + n) for n in range(3)] == [0, 0, -errno.EBUSY]
    run.now = 100.5
    assert [run.share(44), run.share(45)] == [0, -errno.EBUSY]
    run.now = 900.0
    assert [run.share(46 + n) for n in range(3)] == [0, 0, -errno.EBUSY]
    assert run.unshare(0) == 0


def test_hysteresis_delays_the_discard_and_a_share_cancels_it(memory: GuestMemory) -> None:
    run = Run(memory, Hysteresis(seconds=1))

    assert run.unshare(0, 4) == 0
    assert run.share(0, 2) == 0

    assert memory.pread(2, page(1)) == b"xx"
    assert run.pages_in(PageState.DEFERRED) == 2
    run.now = 101.0
    run.converter.settle()
    assert run.pages_in(PageState.DEFERRED) == 0
    assert data_pages(memory.shared.fd) == set(range(32)) - {2, 3}


def test_keep_shared_keeps_up_to_its_limit_for_good(memory: GuestMemory) -> None:
    run = Run(memory, KeepShared(limit=page(4)))

    answers = [run.unshare(0, 3), run.unshare(10, 2), run.unshare(20)]
    run.now = 1e9
    run.converter.settle()

    assert answers == [0, 0, 0]
    assert run.pages_in(PageState.DEFERRED) == 4
    assert data_pages(memory.shared.fd) == set(range(32)) - {10, 11}


def test_coalesce_turns_neighbours_into_one_conversion_in_any_order(memory: GuestMemory) -> None:
    punched: list[tuple[int, int]] = []
    punch = memory.shared.punch

    def noting(offset: int, size: int) -> None:
        punched.append((offset, size))
        punch(offset, size)

    memory.shared.punch = noting  # type: ignore[method-assign]
    run = Run(memory, Coalesce(size=page(4), seconds=1))

    answers = [run.unshare(first) for first in (8, 10, 0, 7, 9)]

    assert answers == [0] * 5
    assert punched == [(page(7), page(4))]
    assert run.pages_in(PageState.DEFERRED) == 1
    assert tally(run.converter, Kind.UNSHARE)["bytes"] == page(5)


def test_coalesce_joins_pages_at_the_start_of_ram(memory: GuestMemory) -> None:
    run = Run(memory, Coalesce(size=page(4), seconds=1))

    for first in range(4):
        run.unshare(first)

    assert run.pages_in(PageState.DEFERRED) == 0


def test_coalesce_discards_what_stays_small_in_one_go_at_the_periods_end(
    memory: GuestMemory,
) -> None:
    run = Run(memory, Coalesce(size=page(8), seconds=1))
    run.unshare(8)
    run.now = 100.7
    run.unshare(9)
    run.now = 101.0

    run.converter.settle()

    assert run.pages_in(PageState.DEFERRED) == 0
    assert data_pages(memory.shared.fd) & {8, 9} == set()


def test_deferred_discard_clears_up_in_one_go_and_nothing_comes_back(memory: GuestMemory) -> None:
    run = Run(memory, DeferredDiscard(seconds=1, limit=page(6)))

    answers = [run.unshare(0, 4), run.unshare(6), run.unshare(10, 2), run.share(1)]

    assert answers == [0] * 4
    assert run.pages_in(PageState.DEFERRED) == 4  # 10 and 11 went over the limit
    assert memory.pread(1, page(1)) == b"\0"
    run.now = 101.0
    run.converter.settle()
    assert run.pages_in(PageState.DEFERRED) == 0
    assert data_pages(memory.shared.fd) - {1} == set(range(12, 32)) | {4, 5, 7, 8, 9}


def test_page_budget_counts_what_is_resident_on_both_sides(memory: GuestMemory) -> None:
    assert memory.private is not None
    run = Run(memory, PageBudget(page(34)))

    answers = [run.share(40, 2), run.share(50, 3)]  # 32 pages are there
    memory.private.pwrite(b"x" * page(1), page(60))
    answers.append(run.share(40, 2))
    run.unshare(0, 8)

    assert answers == [0, -errno.ENOMEM, -errno.ENOMEM]
    assert run.share(50, 3) == 0


@pytest.mark.parametrize(
    ("named", "refused"), [("ring", False), ("descriptor", False), (None, True)]
)
def test_least_privilege_refuses_what_nothing_names(
    memory: GuestMemory, named: str | None, refused: bool
) -> None:
    run = Run(memory, LeastPrivilege())
    ask = run.converter.hooks.watcher(run.converter.view, "blk0")
    assert ask is not None

    with nullcontext() if named else pytest.raises(AccessDenied):
        ask(Range(0x10, 5), True, named)


class DenySecond(Policy):
    def on_share(self, event: Event, view: View) -> Deny:
        return Deny(errno.EPERM)


def test_audit_writes_what_the_wrapped_policy_decides(memory: GuestMemory, tmp_path: Path) -> None:
    run = Run(memory, Audit(tmp_path / "log", DenySecond()))

    answers = [run.unshare(0), run.share(40, 2)]
    run.now = 101.5
    run.converter.hooks.exit(End("poweroff", ""), run.converter.view)

    assert answers == [0, -errno.EPERM]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line.get("decision") for line in lines] == ["Allow()", "Deny(errno=1)", None]
    assert lines[1] == {
        "s": 0.0, "kind": "share", "doorbell": "test", "gpa": "0x28000", "bytes": 8192, "vcpu": 0,
        "decision": "Deny(errno=1)",
    }  # fmt: skip
    assert lines[2] == {"s": 1.5, "exit": "poweroff", "reason": ""}


class Refusing(Policy):
    def on_fault(self, event: Event, view: View) -> Deny:
        return Deny(errno.EPERM)


def test_audit_has_the_hooks_that_the_wrapped_policy_has(
    memory: GuestMemory, tmp_path: Path
) -> None:
    plain = Run(memory, Audit(tmp_path / "plain"))
    least = Run(memory, Audit(tmp_path / "least", LeastPrivilege()))
    refusing = Run(memory, Audit(tmp_path / "refusing", Refusing()))

    assert plain.converter.hooks.watcher(plain.converter.view, "blk0") is None
    ask = least.converter.hooks.watcher(least.converter.view, "blk0")
    assert ask is not None
    with pytest.raises(AccessDenied):
        ask(Range(0x10, 5), True, None)
    assert plain.converter.fault(Kind.SHARE, page(40), page(1), 0) == 0
    assert refusing.converter.fault(Kind.SHARE, page(41), page(1), 0) == -errno.EPERM
    for run in (plain, least, refusing):
        run.converter.hooks.exit(End("poweroff", ""), run.converter.view)

    io, _ = (json.loads(line) for line in (tmp_path / "least").read_text().splitlines())
    assert io == {
        "s": 0.0, "kind": "io", "gpa": "0x10", "bytes": 5, "device": "blk0", "named": None,
        "write": True, "decision": "Deny(errno=13)",
    }  # fmt: skip
    for name, decision in (("plain", "Allow()"), ("refusing", "Deny(errno=1)")):
        noted, _ = (json.loads(line) for line in (tmp_path / name).read_text().splitlines())
        assert (noted["doorbell"], noted["decision"]) == ("fault", decision)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quota(-1),
        lambda: RateLimit(0),
        lambda: RateLimit(1, 0),
        lambda: Hysteresis(0),
        lambda: KeepShared(-1),
        lambda: DeferredDiscard(0),
        lambda: DeferredDiscard(limit=-1),
        lambda: PageBudget(-1),
        lambda: Coalesce(size=100),
        lambda: Coalesce(seconds=0),
        lambda: DenyAfterBoot(-1),
    ],
)
def test_senseless_argument_is_refused(make: type[Policy]) -> None:
    with pytest.raises(ValueError, match="="):
        make()
