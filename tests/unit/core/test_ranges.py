"""Range, and RangeMap against a plain dict with one entry per address."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmm.core.ranges import PAGE_SIZE, Range, RangeMap, page_align_down, page_align_up

SPAN = Range(3, 40)
VALUES = ("a", "b", "c")


@st.composite
def inside(draw: st.DrawFn) -> Range:
    """A range of at least one address inside SPAN."""
    start = draw(st.integers(SPAN.start, SPAN.end - 1))
    return Range(start, draw(st.integers(1, SPAN.end - start)))


small_ranges = st.builds(Range, st.integers(0, 20), st.integers(0, 20))


@given(small_ranges, small_ranges)
def test_range_relations_agree_with_sets_of_addresses(one: Range, other: Range) -> None:
    mine, theirs = set(range(one.start, one.end)), set(range(other.start, other.end))

    common = one.intersection(other)

    assert one.overlaps(other) == bool(mine & theirs)
    held = set() if common is None else set(range(common.start, common.end))
    assert held == mine & theirs
    assert (common is None) == (not mine & theirs)
    if theirs:
        assert one.contains(other) == (theirs <= mine)


@pytest.mark.parametrize(
    ("hole", "left"),
    [
        (Range(0x4000, 0x2000), [Range(0x2000, 0x2000), Range(0x6000, 0x2000)]),
        (Range(0x2000, 0x2000), [Range(0x4000, 0x4000)]),
        (Range(0x0000, 0x2000), [Range(0x2000, 0x6000)]),
        (Range(0x7000, 0x9000), [Range(0x2000, 0x5000)]),
        (Range(0x9000, 0x1000), [Range(0x2000, 0x6000)]),
        (Range(0x0000, 0x9000), []),
        (Range(0x4000, 0), [Range(0x2000, 0x6000)]),
    ],
)
def test_range_without_a_hole_is_what_lies_around_it(hole: Range, left: list[Range]) -> None:
    assert Range(0x2000, 0x6000).without(hole) == left


def test_range_as_text_is_half_open_and_hexadecimal() -> None:
    assert str(Range(0x1000, 0x1000)) == "[0x1000, 0x2000)"


@given(st.integers(0, 1 << 70))
def test_page_align_rounds_to_the_neighbouring_boundaries(value: int) -> None:
    down, up = page_align_down(value), page_align_up(value)

    assert down % PAGE_SIZE == up % PAGE_SIZE == 0
    assert down <= value <= up
    assert up - down == (PAGE_SIZE if value % PAGE_SIZE else 0)


class RangeMapMachine(RuleBasedStateMachine):
    """Any sequence of changes leaves the map equal to the dict, and its runs maximal."""

    def __init__(self) -> None:
        super().__init__()
        self.map = RangeMap(SPAN, "a")
        self.model = dict.fromkeys(range(SPAN.start, SPAN.end), "a")

    @rule(target_range=inside(), value=st.sampled_from(VALUES))
    def set(self, target_range: Range, value: str) -> None:
        self.map.set(target_range, value)
        for address in range(target_range.start, target_range.end):
            self.model[address] = value

    @rule(within=inside())
    def runs_within(self, within: Range) -> None:
        seen = {
            address: value
            for run, value in self.map.runs(within)
            for address in range(run.start, run.end)
        }
        assert seen == {a: v for a, v in self.model.items() if within.start <= a < within.end}

    @rule(area=inside(), value=st.sampled_from(VALUES))
    def uniform(self, area: Range, value: str) -> None:
        expected = all(self.model[address] == value for address in range(area.start, area.end))
        assert self.map.is_uniform(area.start, area.end, value) == expected

    @rule(area=inside(), value=st.sampled_from(VALUES))
    def growth_is_known_before(self, area: Range, value: str) -> None:
        count, growth = len(self.map), self.map.growth(area, value)
        self.set(area, value)
        assert len(self.map) - count == growth <= 2

    @rule(area=inside())
    def looks_within(self, area: Range) -> None:
        held = [self.model[address] for address in range(area.start, area.end)]
        assert self.map.values(area) == set(held)
        same = held[0] if len(set(held)) == 1 else None
        assert self.map.uniform(area.start, area.end) == same

    @rule(area=st.none() | inside(), change=inside(), value=st.sampled_from(VALUES))
    def a_copy_is_the_map_and_has_a_life_of_its_own(
        self, area: Range | None, change: Range, value: str
    ) -> None:
        cut = self.map.cut(area)
        assert cut is not None
        copied, before = RangeMap.of(cut), list(self.map.runs())
        assert list(copied.runs()) == list(self.map.runs(area))
        clipped = change.intersection(copied.span)
        if clipped is not None:
            copied.set(clipped, value)
        assert sum(copied.total(each) for each in VALUES) == copied.span.size
        assert list(self.map.runs()) == before

    @invariant()
    def every_address_agrees(self) -> None:
        assert {address: self.map.get(address) for address in self.model} == self.model

    @invariant()
    def runs_are_maximal_and_cover_the_span(self) -> None:
        runs = list(self.map.runs())
        assert len(runs) == len(self.map)
        assert {v: self.map.count(v) for v in VALUES} == {
            v: [held for _, held in runs].count(v) for v in VALUES
        }
        assert runs[0][0].start == SPAN.start
        assert runs[-1][0].end == SPAN.end
        for (left, before), (right, after) in pairwise(runs):
            assert left.end == right.start
            assert before != after

    @invariant()
    def totals_agree(self) -> None:
        held = list(self.model.values())
        assert {value: self.map.total(value) for value in VALUES} == {
            value: held.count(value) for value in VALUES
        }


TestRangeMap = RangeMapMachine.TestCase
TestRangeMap.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    "target",
    [Range(2, 2), Range(42, 2), Range(0, 100), Range(5, 0), Range(5, -1)],
    ids=["before", "past", "around", "empty", "negative"],
)
def test_set_outside_the_span_or_empty_is_refused_and_changes_nothing(target: Range) -> None:
    states = RangeMap(SPAN, "a")

    with pytest.raises(ValueError, match="not inside the map's span"):
        states.set(target, "b")

    assert list(states.runs()) == [(SPAN, "a")]


def test_runs_outside_the_span_are_none() -> None:
    assert list(RangeMap(SPAN, "a").runs(Range(100, 5))) == []
    assert RangeMap(SPAN, "a").cut(Range(100, 5)) is None
    assert RangeMap(SPAN, "a").values(Range(100, 5)) == set()


def test_total_walks_no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    states = RangeMap(SPAN, "a")
    states.set(Range(5, 2), "b")
    monkeypatch.setattr(RangeMap, "runs", None)

    assert (states.total("a"), states.total("b"), states.total("c")) == (38, 2, 0)


def test_runs_partly_outside_the_span_are_clipped() -> None:
    assert list(RangeMap(SPAN, "a").runs(Range(0, 5))) == [(Range(3, 2), "a")]
