"""Hypothesis plays guest, host, policy and failing kernel at once, on the model of KVM, with the
reference beside every step. What it finds, it shortens to the fewest steps."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.fuzz import conversion_ops as ops
from tests.fuzz.conversion_programs import Cell, fake_cells
from tests.fuzz.conversion_worlds import World
from tests.fuzz.reference import SHARE, UNSHARE, Request
from vmm.memory.guest_memory import GuestMemory
from vmm.policy import Allow
from vmm.policy.hooks import Hooks

KINDS = st.sampled_from((SHARE, UNSHARE))
PAGE = st.integers(0, ops.PAGES - 1)
WORD = st.integers(1, (1 << 64) - 1)
FAIL_AT = st.none() | st.integers(0, 3)
POLICY = st.sampled_from(ops.POLICIES)
ANY_NUMBER = st.integers(-2, 2 * ops.PAGES) | st.integers(0, (1 << 64) - 1)


@st.composite
def areas(draw: st.DrawFn) -> tuple[int, int]:
    """(first page, pages), inside."""
    first = draw(PAGE)
    return first, draw(st.integers(1, ops.PAGES - first))


@cache
def cells() -> list[Cell]:
    return fake_cells()


class Conversions(RuleBasedStateMachine):
    """One VM under one of the schemes, with one of its backings."""

    world: World | None = None

    @initialize(number=st.integers(0, 1 << 16))
    def start(self, number: int) -> None:
        cell = cells()[number % len(cells())]
        self.world = World(cell.platform, cell.combination)

    def step(self, op: ops.Op) -> str:
        assert self.world is not None
        return self.world.step(op)

    @rule(kind=KINDS, area=areas(), policy=POLICY, fail_at=FAIL_AT)
    def convert(self, kind: str, area: tuple[int, int], policy: str, fail_at: int | None) -> None:
        self.step(ops.Convert(Request(kind, *area), policy, fail_at))

    @rule(
        kind=KINDS,
        first=ANY_NUMBER,
        count=ANY_NUMBER,
        offset=st.sampled_from((0, 0, 0, 1, 8, 4095)),
        reserved=st.sampled_from((0, 0, 0, 3, 1 << 5, 1 << 63)),
        policy=POLICY,
    )
    def ask_for_anything(
        self, kind: str, first: int, count: int, offset: int, reserved: int, policy: str
    ) -> None:
        self.step(ops.Convert(Request(kind, first, count, offset, reserved), policy, None))

    @rule(kind=KINDS, page=PAGE)
    def fault(self, kind: str, page: int) -> None:
        self.step(ops.Fault(kind, page))

    @rule(fail_at=FAIL_AT)
    def time_passes(self, fail_at: int | None) -> None:
        self.step(ops.Settle(fail_at))

    @rule(page=PAGE, word=WORD)
    def guest_writes(self, page: int, word: int) -> None:
        self.step(ops.GuestWrite(page, False, word))

    @rule(page=PAGE)
    def guest_reads(self, page: int) -> None:
        self.step(ops.GuestRead(page, False))

    @precondition(lambda self: self.world is not None and self.world.rig.has_aliases)
    @rule(page=PAGE, word=st.none() | WORD)
    def guest_uses_the_other_alias(self, page: int, word: int | None) -> None:
        op = ops.GuestRead(page, True) if word is None else ops.GuestWrite(page, True, word)
        self.step(op)

    @rule(area=areas(), word=WORD)
    def host_writes(self, area: tuple[int, int], word: int) -> None:
        self.step(ops.HostWrite(*area, word))

    @rule(area=areas())
    def host_reads(self, area: tuple[int, int]) -> None:
        self.step(ops.HostRead(*area))

    @precondition(lambda self: self.world is not None and self.world.reference.in_place)
    @rule(page=st.none() | PAGE)
    def somebody_holds_a_page(self, page: int | None) -> None:
        self.step(ops.Hold(page))

    @rule(
        start=st.integers(-4096, 4096 * (ops.PAGES + 1)),
        size=st.integers(0, 3 * 4096),
    )
    def host_peeks(self, start: int, size: int) -> None:
        self.step(ops.Peek(start, size))

    @invariant()
    def states_and_residency_are_as_the_reference_says(self) -> None:
        if self.world is not None:
            self.step(ops.Look())

    def teardown(self) -> None:
        if self.world is not None:
            self.world.__exit__()


def run_machine(examples: int, *phases: Phase) -> None:
    run_state_machine_as_test(
        Conversions,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=phases or tuple(Phase),
            print_blob=True,
        ),
    )


@pytest.mark.timeout(1800)
def test_conversions_stay_with_the_reference(fuzz_factor: int) -> None:
    run_machine(200 * fuzz_factor)


def allow(hooks: Hooks, *arguments: object) -> Allow:
    return Allow()


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (GuestMemory, "discard_private", lambda memory, area: None),
        (GuestMemory, "_require_shared", lambda memory, gpa, size: None),
        (Hooks, "decide", allow),
    ],
)
def test_machine_finds_a_fault(
    owner: type, name: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)

    with pytest.raises((AssertionError, OSError), match=r"the reference says|memfd ends"):
        run_machine(200, Phase.generate)  # unshortened, for time
