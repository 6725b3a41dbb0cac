"""A trace's requests against other policies: the same converter, a clock of recorded times."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.conversion import Answering
from tests.support.trace import MILLISECOND, PAGE, Events
from vmm.core.errors import UsageError
from vmm.core.events import FAULT
from vmm.core.ranges import Range
from vmm.policy import (
    Allow,
    Convert,
    Decision,
    Defer,
    Deny,
    Event,
    Kill,
    LendEvent,
    PageState,
    Partial,
    Policy,
    PolicyError,
    View,
)
from vmm.policy.builtin import Quota
from vmm.replay.figures import recorded
from vmm.replay.figures import replayed as replayed_figures
from vmm.replay.replay import Replay
from vmm.trace.cost import learn, requests_of
from vmm.trace.layout import Kind
from vmm.trace.reader import Trace


def events() -> Events:
    """64 pages, the first 8 shared; four pages shared at 10 ms, two of them unshared at 20 ms."""
    made = Events((0, 8, "shared"), (8, 56, "private"))
    made.convert(Kind.SHARE, 10, 32, 4, took=1.0)
    made.convert(Kind.UNSHARE, 20, 32, 2, took=2.0)
    return made


def replayed(made: Events, folder: Path, *policies: Policy, until_ms: float = 100) -> Replay:
    with closing(Trace(made.write(folder / "t"))) as trace:
        requests = requests_of(trace)
        with closing(Replay(trace, requests, policies)) as replay:
            replay.run(learn(trace, requests), round(until_ms * MILLISECOND))
    return replay


def test_replay_without_a_policy_does_what_the_run_did(tmp_path: Path) -> None:
    replay = replayed(events(), tmp_path)

    assert (replay.conversions, replay.converted_bytes) == (2, 6 * PAGE)
    assert replay.refused == []
    assert replay.changes == [
        (10 * MILLISECOND, 32 * PAGE, 4 * PAGE, 1),
        (20 * MILLISECOND, 32 * PAGE, 2 * PAGE, 2),
    ]
    assert replay.guest_ns == pytest.approx(3 * MILLISECOND)


def test_replay_of_a_refusal_has_it_and_leaves_the_pages(tmp_path: Path) -> None:
    replay = replayed(events(), tmp_path, Answering(Deny(errno.EPERM)))

    first = replay.refused[0]
    assert (first.time_ns, first.kind, first.gpa, first.bytes, first.decision, first.errno) == (
        10 * MILLISECOND, "share", 32 * PAGE, 4 * PAGE, "deny", errno.EPERM,
    )  # fmt: skip
    assert len(replay.refused) == 2
    assert replay.changes == []


def test_replay_gives_policies_the_recorded_times_and_states(tmp_path: Path) -> None:
    seen: list[tuple[float, int, Event]] = []

    class Looking(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            seen.append((view.now, view.bytes_in(PageState.SHARED), event))
            return Allow()

        on_unshare = on_share

    replayed(events(), tmp_path, Looking())

    assert [(round(now, 6), shared) for now, shared, _ in seen] == [
        (0.01, 8 * PAGE), (0.02, 12 * PAGE),
    ]  # fmt: skip
    assert seen[0][2].area == Range(32 * PAGE, 4 * PAGE)
    assert seen[0][2].doorbell == "hypercall"


class PutOff(Policy):
    """Defers unshares until a time."""

    def __init__(self, until: float) -> None:
        self.until = until

    def on_unshare(self, event: Event, view: View) -> Decision:
        return Defer(self.until)


def test_replay_carries_out_late_discards_when_they_are_due(tmp_path: Path) -> None:
    replay = replayed(events(), tmp_path, PutOff(0.05))

    assert [(at // MILLISECOND, state) for at, _, _, state in replay.changes] == [
        (10, 1), (20, 3), (50, 2),
    ]  # fmt: skip
    assert (replay.conversions, replay.late_discards, replay.late_bytes) == (1, 1, 2 * PAGE)
    assert replay.host_ns > 0


def test_replay_carries_out_late_discards_before_the_requests_after_them(tmp_path: Path) -> None:
    made = events()
    made.convert(Kind.SHARE, 30, 50, 1)

    replay = replayed(made, tmp_path, PutOff(0.025))

    assert [(at // MILLISECOND, state) for at, _, _, state in replay.changes] == [
        (10, 1), (20, 3), (25, 2), (30, 1),
    ]  # fmt: skip


def test_replay_takes_requests_in_the_converters_order_and_time_never_goes_back(
    tmp_path: Path,
) -> None:
    times: list[float] = []

    class Looking(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            times.append(view.now)
            return Allow()

    made = events()
    made.convert(Kind.SHARE, 40, 50, 1, took=1.0)
    made.convert(Kind.SHARE, 39, 51, 1, took=9.0)  # waited for the one before

    replay = replayed(made, tmp_path, Looking())

    assert [gpa // PAGE for _, gpa, _, _ in replay.changes[2:]] == [50, 51]
    assert times == sorted(times)


def test_replay_asks_before_the_guest_boots(tmp_path: Path) -> None:
    class Unwilling(Policy):
        def on_boot(self, view: View) -> Decision:
            return Kill("not today")

    replay = replayed(events(), tmp_path, Unwilling())

    assert replay.ended == (0.0, "policy Unwilling: not today")
    assert sum(replay.decisions.values()) == 0


def test_replay_ends_where_the_run_ended(tmp_path: Path) -> None:
    replay = replayed(events(), tmp_path, PutOff(0.2), until_ms=100)

    assert replay.late_discards == 0


def test_replay_of_a_share_takes_deferred_pages_back(tmp_path: Path) -> None:
    made = events()
    made.convert(Kind.SHARE, 30, 32, 2)

    replay = replayed(made, tmp_path, PutOff(0.05))

    assert replay.late_discards == 0
    assert replay.converter.refinements.reclaimed_bytes == 2 * PAGE


def test_replay_of_partial_and_convert_does_what_they_say(tmp_path: Path) -> None:
    part = Answering(Partial(Range(33 * PAGE, PAGE)))
    partial = replayed(events(), tmp_path / "1", part)
    wide = Answering(Convert(Range(32 * PAGE, 4 * PAGE)))
    made = Events((0, 8, "shared"), (8, 56, "private"))
    made.convert(Kind.SHARE, 10, 32, 4)
    converted = replayed(made, tmp_path / "2", wide)

    # The unshare asks for pages 32 and 33, of which 32 was never shared: all is as it wants it.
    assert [(r.decision, r.errno) for r in partial.refused] == [("partial", errno.EAGAIN)]
    assert partial.converted_bytes == 2 * PAGE
    assert (converted.decisions["convert"], converted.converted_bytes) == (1, 4 * PAGE)


def test_replay_of_a_kill_stops_there(tmp_path: Path) -> None:
    replay = replayed(events(), tmp_path, Answering(Kill("enough")))

    assert replay.ended is not None
    assert round(replay.ended[0], 6) == 0.01
    assert replay.ended[1] == "policy Answering: enough"
    assert sum(replay.decisions.values()) == 1


def test_replay_with_a_broken_policy_says_so(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="raised ZeroDivisionError"):
        replayed(events(), tmp_path, Answering(ZeroDivisionError()))


def test_replay_leaves_invalid_requests_invalid(tmp_path: Path) -> None:
    made = events()
    wrong: Sequence[Any] = ({"gpa": 5, "size": PAGE}, {"gpa": 0, "size": 1 << 60}, {"size": PAGE})
    for at, about in enumerate(wrong):  # the last one had reserved bits, which no trace has
        made.add(Kind.SHARE, 40 + at, "hypercall", errno=errno.EINVAL, **about)
    policy = Answering(Allow())

    replay = replayed(made, tmp_path, policy)

    assert replay.decisions["none"] == 3
    assert len(policy.asked) == 2


def test_replay_of_a_fault_asks_as_for_a_fault(tmp_path: Path) -> None:
    made = Events((0, 64, "private"))
    made.state(10, 3, 1, "shared")
    made.add(Kind.SHARE, 10, FAULT, gpa=3 * PAGE, size=PAGE, decision="allow")

    class OnFault(Policy):
        def on_fault(self, event: Event, view: View) -> Decision:
            return Deny(errno.EBUSY)

    assert [r.errno for r in replayed(made, tmp_path, OnFault()).refused] == [errno.EBUSY]


def test_replay_says_that_residency_is_not_known(tmp_path: Path) -> None:
    class Asking(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            assert view.residency() == (56 * PAGE, 8 * PAGE)
            return Allow()

    assert replayed(events(), tmp_path / "1", Asking()).residency_asked
    assert not replayed(events(), tmp_path / "2", Policy()).residency_asked


# --- pages lent to devices ----------------------------------------------------------------------


def lending() -> Events:
    """64 pages, all private: two lent to a disk at 10 and 12 ms, one to a network function."""
    made = Events((0, 64, "private"))
    made.add(Kind.LEND, 10, "blk0", gpa=32 * PAGE, size=2 * PAGE, by="write")
    made.add(Kind.LEND, 12, "blk0", gpa=40 * PAGE, size=PAGE, by="read and write")
    made.add(Kind.RETURN, 10, "blk0", gpa=32 * PAGE, size=2 * PAGE, took=10)
    made.add(Kind.LEND, 21, "net0", gpa=32 * PAGE, size=PAGE, by="read")
    made.add(Kind.RETURN, 12, "blk0", gpa=40 * PAGE, size=PAGE, took=10)
    return made


class Noting(Policy):
    """Writes down what it is asked about lending, when, and how much is lent then."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Range, bool, bool, int, int]] = []

    def _note(self, kind: str, event: LendEvent, view: View) -> Decision:
        lent = view.bytes_in(PageState.LENT) // PAGE
        way = event.may_read, event.may_write
        self.asked.append((kind, event.device, event.area, *way, round(view.now * 1000), lent))
        return Allow()

    def on_lend(self, event: LendEvent, view: View) -> Decision:
        return self._note("lend", event, view)

    def on_return(self, event: LendEvent, view: View) -> Decision:
        return self._note("return", event, view)


def test_replay_asks_about_lending_as_the_run_did(tmp_path: Path) -> None:
    policy = Noting()

    replay = replayed(lending(), tmp_path, policy)

    disk, other, net = (Range(at * PAGE, n * PAGE) for at, n in ((32, 2), (40, 1), (32, 1)))
    assert policy.asked == [
        ("lend", "blk0", disk, False, True, 10, 0),
        ("lend", "blk0", other, True, True, 12, 2),
        ("return", "blk0", disk, False, True, 20, 3),
        ("lend", "net0", net, True, False, 21, 1),
        ("return", "blk0", other, True, True, 22, 2),
    ]
    assert (replay.lends, replay.returns, replay.lends_refused) == (3, 2, 0)
    assert replay.lent_bytes_peak == 3 * PAGE
    assert replay.lender.counts.lent_us == {16384: 2}  # 10 ms each


def test_replay_of_lending_that_is_refused_has_no_return_of_it(tmp_path: Path) -> None:
    replay = replayed(lending(), tmp_path, Quota(PAGE))

    assert (replay.lends, replay.returns, replay.lends_refused) == (3, 2, 2)
    assert replay.lent_bytes_peak == PAGE
    assert [(r.kind, r.gpa // PAGE, r.errno) for r in replay.refused] == [
        ("lend", 32, errno.EACCES),
        ("lend", 32, errno.EACCES),
    ]
    assert replay.lender.lent_bytes == 0


class NoReturn(Policy):
    def on_return(self, event: LendEvent, view: View) -> Decision:
        return Deny()


def test_replay_of_a_return_that_is_refused_leaves_the_pages_lent(tmp_path: Path) -> None:
    made = lending()
    made.convert(Kind.SHARE, 30, 32, 1, took=1.0)

    replay = replayed(made, tmp_path, NoReturn())

    assert [r.kind for r in replay.refused] == ["return", "return", "share"]
    assert replay.refused[-1].errno == errno.EBUSY  # what is lent isn't shared
    assert replay.lender.lent_bytes == 3 * PAGE


def test_replay_of_lending_that_makes_no_sense_lends_nothing(tmp_path: Path) -> None:
    made = Events((0, 64, "private"))
    for gpa, size in ((PAGE, 0), (PAGE + 1, PAGE), (PAGE, 1), (1 << 50, PAGE), (0, 65 * PAGE)):
        made.add(Kind.LEND, 10, "blk0", gpa=gpa, size=size)
    made.add(Kind.RETURN, 10, "blk0", gpa=PAGE, size=PAGE, took=1)

    replay = replayed(made, tmp_path)

    assert (replay.lends, replay.returns, replay.lent_bytes_peak) == (5, 1, 0)
    assert replay.lender.lent_bytes == 0


def test_replay_of_a_trace_without_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say how the guest's memory began"):
        replayed(Events(), tmp_path)


# -- the cost model -------------------------------------------------------------------------------


def test_cost_model_finds_the_line_that_latencies_lie_on(tmp_path: Path) -> None:
    made = Events((0, 4096, "private"))
    for number, pages in enumerate((1, 1, 2, 8, 64)):
        # 0.5 ms and 0.01 ms a page; one outlier among those of a page.
        made.convert(Kind.SHARE, 100 * number, 100 * number, pages, took=0.5 + 0.01 * pages)
        made.convert(Kind.UNSHARE, 100 * number + 50, 100 * number, pages, took=0.25)
    for number in range(2):
        made.convert(Kind.SHARE, 900 + number, 900 + number, 1, took=0.51 if number else 50.0)
    made.request(Kind.SHARE, 1000, 0, 1, decision="deny", errno=errno.EACCES, took=0.125)
    trace = Trace(made.write(tmp_path / "t"))

    model = learn(trace, requests_of(trace))

    assert model.share.fixed == pytest.approx(0.5 * MILLISECOND)
    assert model.share.per_byte * PAGE == pytest.approx(0.01 * MILLISECOND)
    assert (model.share.requests, model.share.sizes) == (7, 4)
    assert (model.unshare.fixed, model.unshare.per_byte) == (0.25 * MILLISECOND, 0.0)
    assert (model.nothing, model.idle) == (0.125 * MILLISECOND, 1)
    assert model.late_discard(PAGE) == pytest.approx(0.125 * MILLISECOND)


def test_cost_model_never_goes_below_zero(tmp_path: Path) -> None:
    made = Events((0, 4096, "private"))
    for number, (pages, took) in enumerate(((1, 0.001), (100, 1.0), (1, 0.001))):
        made.convert(Kind.SHARE, 10 * number, 200 * number, pages, took=took)
    trace = Trace(made.write(tmp_path / "t"))

    model = learn(trace, requests_of(trace))

    assert model.share.fixed == 0.0
    assert model.share.cost(100 * PAGE) == pytest.approx(1.0 * MILLISECOND, rel=0.01)
    assert model.unshare == model.share  # there was none


def test_cost_model_of_larger_ranges_that_were_quicker_is_flat(tmp_path: Path) -> None:
    made = Events((0, 4096, "private"))
    for number, (pages, took) in enumerate(((1, 3.0), (100, 1.0))):
        made.convert(Kind.SHARE, 10 * number, 200 * number, pages, took=took)
    trace = Trace(made.write(tmp_path / "t"))

    model = learn(trace, requests_of(trace))

    assert (model.share.fixed, model.share.per_byte) == (2.0 * MILLISECOND, 0.0)


def test_cost_model_of_a_trace_without_conversions_is_nothing(tmp_path: Path) -> None:
    trace = Trace(Events((0, 4, "private")).write(tmp_path / "t"))

    model = learn(trace, requests_of(trace))

    assert (model.share.requests, model.nothing) == (0, 0.0)


def test_late_discards_in_a_trace_are_nobodys_requests(tmp_path: Path) -> None:
    made = Events((0, 64, "private"))
    made.convert(Kind.SHARE, 1, 0, 4)
    made.state(10, 0, 4, "deferred")
    made.request(Kind.UNSHARE, 10, 0, 4, decision="defer")
    made.state(15, 0, 4, "private")  # when it fell due
    made.convert(Kind.SHARE, 20, 8, 2)
    trace = Trace(made.write(tmp_path / "t"))

    found = requests_of(trace)

    assert found.changed.tolist() == [4 * PAGE, 0, 2 * PAGE]
    assert found.late.tolist() == [4 * PAGE]


def test_figures_of_a_replay_without_policies_are_the_recorded_ones(tmp_path: Path) -> None:
    made = events()

    with closing(Trace(made.write(tmp_path / "t"))) as trace:
        requests = requests_of(trace)
        model = learn(trace, requests)
        with closing(Replay(trace, requests, [])) as replay:
            replay.run(model, 100 * MILLISECOND)
            after = replayed_figures(replay, 100 * MILLISECOND)
        before = recorded(trace, requests, model, 100 * MILLISECOND)

    assert before.pop("waited_ns") == 3 * MILLISECOND
    # A replay's changes take no time: the pages are shared a moment longer.
    assert before.pop("shared_bytes_mean") == pytest.approx(
        after.pop("shared_bytes_mean"), rel=0.02
    )
    assert before == pytest.approx(after)


def test_figures_count_what_is_put_off_apart_from_what_is_shared(tmp_path: Path) -> None:
    replay = replayed(events(), tmp_path, PutOff(0.06))

    figures = replayed_figures(replay, 100 * MILLISECOND)

    # Two pages for 40 of 100 ms.
    assert figures["deferred_bytes_mean"] == pytest.approx(2 * PAGE * 0.4, abs=1)
    # 8 pages always, 4 more from 10 ms on, 2 fewer from 20 ms on.
    assert figures["shared_bytes_mean"] == pytest.approx(PAGE * (8 + 4 * 0.1 + 2 * 0.8), abs=1)
