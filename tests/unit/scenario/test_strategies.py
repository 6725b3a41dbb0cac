"""The strategies make guests that run, and shrink to what matters; and the model's memory is the
memory that runs guests."""

from __future__ import annotations

import errno

from hypothesis import HealthCheck, example, find, given, settings
from hypothesis import strategies as st

from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Allow, Decision, Defer, Deny, Event, Partial, Policy, View
from vmm.policy.builtin import Quota
from vmm.scenario import Result, Share, Step, run
from vmm.scenario.memory import ModelMemory, ModelScheme
from vmm.scenario.strategies import SMALL_RAM, Program, areas, hostile_areas, programs, steps
from vmm.trace.cost import CostModel, Line

MODEL = CostModel(Line(1000.0, 0.0, 1, 1), Line(1000.0, 0.0, 1, 1), 500.0, 1)
BRIEF = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FINDING = settings(BRIEF, max_examples=1000, database=None)


def done(program: Program, *policies: Policy) -> Result:
    return run(program.scenario(), policies, model=MODEL)


@BRIEF
@given(programs(faults=True, hostile=True))
def test_program_of_any_kind_runs_to_its_end(program: Program) -> None:
    result = done(program)

    assert result.ended is None
    assert result.figures["shared_bytes_peak"] <= SMALL_RAM


@BRIEF
@given(programs(hostile=True), st.integers(0, 64))
def test_quota_holds_against_every_program(program: Program, pages: int) -> None:
    figures = done(program, Quota(pages * PAGE_SIZE)).figures

    assert figures["shared_bytes_peak"] <= pages * PAGE_SIZE


class ForgetsWhatIsShared(Policy):
    """A quota with a fault: it counts requests, not pages."""

    def on_share(self, event: Event, view: View) -> Decision:
        return Allow() if event.area.size <= 4 * PAGE_SIZE else Deny()


def test_program_shrinks_to_the_two_requests_that_show_a_fault() -> None:
    def breaks(program: Program) -> bool:
        peak = done(program, ForgetsWhatIsShared()).figures["shared_bytes_peak"]
        return peak > 4 * PAGE_SIZE

    least = find(programs(most_steps=10, most_cpus=1), breaks, settings=FINDING)

    shares = [step for step in least.vcpus[0] if isinstance(step, Share)]
    assert len(least.vcpus[0]) == len(shares) == 2
    assert sum(step.area.size for step in shares) == 5 * PAGE_SIZE


@BRIEF
@given(areas())
def test_areas_are_whole_pages_of_ram(area: Range) -> None:
    assert area.size > 0 and area.end <= SMALL_RAM
    assert area.start % PAGE_SIZE == area.size % PAGE_SIZE == 0


def test_hostile_areas_reach_beyond_ram_and_into_nothing() -> None:
    find(hostile_areas(), lambda area: area.start >= SMALL_RAM, settings=FINDING)
    find(hostile_areas(), lambda area: area.size == 0, settings=FINDING)


def test_hostile_steps_ask_for_pages_that_are_none() -> None:
    def unaligned(step: Step) -> bool:
        return isinstance(step, Share) and step.area.start % PAGE_SIZE != 0

    assert find(steps(hostile=True), unaligned, settings=FINDING) == Share(Range(1, 0))


def area(first: int, count: int) -> Range:
    return Range(first * PAGE_SIZE, count * PAGE_SIZE)


class Mixed(Policy):
    """Answers by the number of the request: all that changes how it is carried out."""

    def __init__(self) -> None:
        self._count = 0

    def on_share(self, event: Event, view: View) -> Decision:
        self._count += 1
        if self._count % 3 == 0:
            return Partial(Range(event.area.start, PAGE_SIZE))
        return Allow() if self._count % 5 else Deny(errno.EAGAIN)

    def on_unshare(self, event: Event, view: View) -> Decision:
        self._count += 1
        return Defer(view.now + 1.0) if self._count % 2 else Allow()


@BRIEF
@given(
    st.lists(st.tuples(st.booleans(), areas() | hostile_areas(), st.integers(0, 2)), max_size=40)
)
@example([(True, area(8, 1), 0), (True, area(10, 1), 0), (False, area(8, 4), 0)])  # runs put off
def test_model_memory_does_what_guest_memory_does(requests: list[tuple[bool, Range, int]]) -> None:
    ram = [Range(0, SMALL_RAM // 2), Range(SMALL_RAM // 2 + PAGE_SIZE, SMALL_RAM // 2 - PAGE_SIZE)]
    private = [Range(8 * PAGE_SIZE, 16 * PAGE_SIZE)]
    real = GuestMemory(ram, MemfdBacking(SMALL_RAM), MemfdBacking(SMALL_RAM), private)
    model = ModelMemory(ram, private)
    clock = [0.0]
    converters = [
        Converter(memory, ModelScheme(), Mixed(), clock=lambda: clock[0])
        for memory in (real, model)
    ]
    try:
        for is_share, area, later in requests:
            kind = Kind.SHARE if is_share else Kind.UNSHARE
            request = ConversionRequest(kind, area.start, area.size // PAGE_SIZE, 0, "test")
            answers = [each.convert(request) for each in converters]
            assert answers[0] == answers[1]
            clock[0] += later
            for each in converters:
                each.settle()
            assert real.states() == model.states()
            for state in PageState:
                assert real.bytes_in(state) == model.bytes_in(state)
                assert real.most_bytes_in(state) == model.most_bytes_in(state)
        assert model.shared_bytes == real.bytes_in(PageState.SHARED)
        assert converters[0].accounting.as_dict() == converters[1].accounting.as_dict()
    finally:
        real.close()
        model.close()
