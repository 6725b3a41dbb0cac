"""Scenarios run by the real converter: what a guest gets for its steps, and what is counted."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.conversion import Answering
from vmm.core.events import FAULT
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.policy import (
    Allow,
    Convert,
    Decision,
    Defer,
    Deny,
    End,
    Event,
    IoEvent,
    Kill,
    PageState,
    Partial,
    Policy,
    PolicyError,
    View,
)
from vmm.policy.builtin import Quota
from vmm.scenario import (
    Discard,
    Fault,
    Guest,
    Io,
    Result,
    Scenario,
    ScenarioError,
    Share,
    Steps,
    Unshare,
    Wait,
    run,
    running,
    watch,
)
from vmm.trace.cost import CostModel, Line

MODEL = CostModel(Line(1000.0, 0.0, 1, 1), Line(3000.0, 1.0, 1, 1), 500.0, 1)
"""Nanoseconds: a share 1000, an unshare 3000 and 1 for each byte, a request for nothing 500."""
RAM = 64 * PAGE_SIZE


def area(first: int, count: int = 1) -> Range:
    """So many pages."""
    return Range(first * PAGE_SIZE, count * PAGE_SIZE)


def done(*policies: Policy, by: Callable[..., Steps], **more: Any) -> Result:
    """The result of a small guest."""
    return run(Scenario(by, ram=RAM), policies, model=MODEL, **more)


def test_scenario_without_a_policy_gets_what_it_asks_for() -> None:
    answers: list[int] = []

    def guest(guest: Guest) -> Steps:
        answers.append((yield Share(area(1, 2))))
        answers.append((yield Wait(1.0)))
        answers.append((yield Unshare(area(1))))

    result = done(by=guest)

    assert answers == [0, 0, 0]
    assert result.ended is None
    assert result.steps == 3
    figures = result.figures
    assert (figures["requests"], figures["conversions"]) == (2, 2)
    assert figures["converted_bytes"] == 3 * PAGE_SIZE
    assert figures["shared_bytes_peak"] == 2 * PAGE_SIZE
    assert figures["guest_ns"] == 1000 + 3000 + PAGE_SIZE
    assert result.duration_ns == 1_000_000_000 + 1000 + 3000 + PAGE_SIZE


def test_figures_have_the_keys_of_a_replay(tmp_path: Any) -> None:
    from tests.unit.replay.test_replay import events, replayed
    from vmm.replay.figures import replayed as figures

    def guest(guest: Guest) -> Steps:
        yield Share(area(1))

    assert list(done(by=guest).figures) == list(figures(replayed(events(), tmp_path), 1))


def test_mean_of_shared_bytes_is_over_the_time_that_passed() -> None:
    def guest(guest: Guest) -> Steps:
        yield Share(area(0, 10))
        yield Wait(1.0)
        yield Unshare(area(0, 10))
        yield Wait(1.0)

    mean = done(by=guest).figures["shared_bytes_mean"]

    assert mean == pytest.approx(5 * PAGE_SIZE, rel=0.001)


def test_guest_reacts_to_a_refusal() -> None:
    class OnceBusy(Policy):
        asked = 0

        def on_share(self, event: Event, view: View) -> Decision:
            self.asked += 1
            return Deny(errno.EAGAIN) if self.asked == 1 else Allow()

    tries: list[float] = []

    def guest(guest: Guest) -> Steps:
        while (yield Share(area(5))) == -errno.EAGAIN:
            tries.append(guest.now)
            yield Wait(0.5)

    result = done(OnceBusy(), by=guest)

    assert len(tries) == 1
    assert (result.figures["denied"], result.figures["conversions"]) == (1, 1)
    refusal = result.refused[0]
    assert (refusal.kind, refusal.gpa, refusal.errno, refusal.by) == (
        "share", 5 * PAGE_SIZE, errno.EAGAIN, "OnceBusy",
    )  # fmt: skip
    assert result.duration_ns == 500_000_000 + 500 + 1000


def test_policies_see_the_scenarios_time_states_and_doorbell() -> None:
    seen: list[tuple[float, int, str, int]] = []

    class Looking(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            shared = view.bytes_in(PageState.SHARED)
            seen.append((view.now, event.vcpu, event.doorbell, shared))
            return Allow()

    def guest(guest: Guest) -> Steps:
        yield Wait(2.0)
        yield Share(area(0))
        yield Share(area(1))

    done(Looking(), by=guest)

    assert seen == [
        (2.0, 0, "hypercall", 0),
        (pytest.approx(2.000001), 0, "hypercall", PAGE_SIZE),
    ]


def test_deferred_discard_falls_due_while_the_guest_waits() -> None:
    class Later(Policy):
        def on_unshare(self, event: Event, view: View) -> Decision:
            return Defer(view.now + 0.1)

    states: list[float] = []

    def guest(guest: Guest) -> Steps:
        yield Share(area(0, 4))
        yield Unshare(area(0, 4))
        states.append(guest.now)
        yield Wait(1.0)

    figures = done(Later(), by=guest).figures

    assert (figures["deferred"], figures["late_discards"]) == (1, 1)
    assert figures["guest_ns"] == 1000 + 500  # the unshare costs it nothing but the asking
    assert figures["host_ns"] == 3000 + 4 * PAGE_SIZE - 500
    assert figures["deferred_bytes_mean"] == pytest.approx(0.1 * 4 * PAGE_SIZE, rel=0.001)


def test_partial_and_wider_conversions_are_counted_as_in_a_replay() -> None:
    class Half(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            return Partial(Range(event.area.start, PAGE_SIZE))

        def on_unshare(self, event: Event, view: View) -> Decision:
            return Convert(Range(event.area.start, 2 * PAGE_SIZE))

    answers: list[int] = []

    def guest(guest: Guest) -> Steps:
        answers.append((yield Share(area(0, 2))))
        answers.append((yield Unshare(area(0))))

    figures = done(Half(), by=guest).figures

    assert answers == [-errno.EAGAIN, 0]
    assert (figures["partial"], figures["joined"]) == (1, 1)


@pytest.mark.parametrize(
    "step", [Share(Range(RAM, PAGE_SIZE)), Share(Range(12, PAGE_SIZE)), Unshare(Range(0, 0))]
)
def test_request_that_no_guest_may_make_is_answered_as_by_a_real_one(step: Share) -> None:
    answers: list[int] = []

    def guest(guest: Guest) -> Steps:
        answers.append((yield step))

    assert done(by=guest).figures["invalid"] == 1
    assert answers == [-errno.EINVAL]


def test_device_access_needs_shared_memory_and_the_policies() -> None:
    class NoNet(Policy):
        seen: list[IoEvent] = []

        def on_io(self, event: IoEvent, view: View) -> Decision:
            self.seen.append(event)
            return Deny() if event.device == "net" else Allow()

    answers: list[int] = []

    def guest(guest: Guest) -> Steps:
        yield Share(area(3))
        for device, first in (("disk", 3), ("disk", 4), ("net", 3), ("disk", 1000)):
            buffer = Range(first * PAGE_SIZE + 8, 16)
            answers.append((yield Io(device, buffer, is_write=True, named="ring")))

    result = done(NoNet(), by=guest)

    assert answers == [0, -errno.EFAULT, -errno.EACCES, -errno.EFAULT]
    assert result.io == {"allowed": 1, "denied": 1, "refused": 2}
    assert NoNet.seen[0] == IoEvent("disk", Range(3 * PAGE_SIZE + 8, 16), True, "ring")


def test_fault_converts_what_the_access_needs() -> None:
    seen: list[str] = []

    class Looking(Policy):
        def on_fault(self, event: Event, view: View) -> Decision:
            seen.append(event.doorbell)
            return Allow()

    def guest(guest: Guest) -> Steps:
        yield Fault(Range(100, 8), private=False)
        yield Fault(Range(200, 8), private=False)  # is shared by now
        yield Fault(Range(200, 8))

    figures = done(Looking(), by=guest).figures

    assert seen == [FAULT, FAULT]
    assert figures["conversions"] == 2


def test_fault_that_a_policy_refuses_ends_the_run() -> None:
    ends: list[End] = []

    class Strict(Policy):
        def on_fault(self, event: Event, view: View) -> Decision:
            return Deny(errno.EPERM)

        def on_exit(self, end: End, view: View) -> None:
            ends.append(end)

    def guest(guest: Guest) -> Steps:
        yield Wait(1.0)
        yield Fault(area(7), private=False)
        raise AssertionError("the guest can't go on")

    ended = done(Strict(), by=guest).ended

    assert ended is not None
    assert ended.s == 1.0
    assert "shared memory at GPA 0x7000, 4096 bytes" in ended.why
    assert "EPERM" in ended.why
    assert ends[0].exit == "failed"


def test_kill_ends_the_run_and_the_guest_gets_no_answer() -> None:
    def guest(guest: Guest) -> Steps:
        yield Share(area(0))
        raise AssertionError("no answer")

    result = done(Answering(Kill("enough")), by=guest)

    assert result.ended is not None
    assert result.ended.why == "policy Answering: enough"
    assert result.figures["denied"] == 1


def test_discard_leaves_states_and_is_refused_where_there_is_no_ram() -> None:
    answers: list[int] = []

    def guest(guest: Guest) -> Steps:
        answers.append((yield Discard(area(0, 4))))
        answers.append((yield Discard(area(1000))))
        answers.append((yield Unshare(area(0, 4))))

    figures = done(by=guest).figures

    assert answers == [0, -errno.EFAULT, 0]
    assert figures["conversions"] == 0


def test_vcpus_take_turns_by_their_times() -> None:
    order: list[tuple[int, float]] = []

    def guest(guest: Guest) -> Steps:
        for _ in range(3):
            yield Wait(1.0 + guest.vcpu / 2)
            order.append((guest.vcpu, guest.now))

    run(Scenario(guest, ram=RAM, cpus=2), model=MODEL)

    assert order == [(0, 1.0), (1, 1.5), (0, 2.0), (0, 3.0), (1, 3.0), (1, 4.5)]


def test_vcpus_have_numbers_of_their_own_and_one_memory() -> None:
    events: list[int] = []

    class Looking(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            events.append(event.vcpu)
            return Allow()

    def guest(guest: Guest) -> Steps:
        yield Share(guest.allocate(PAGE_SIZE))
        guest.common["sum"] = guest.common.get("sum", 0) + 1

    figures = run(Scenario(guest, ram=RAM, cpus=3), [Looking()], model=MODEL).figures

    assert events == [0, 1, 2]
    assert figures["shared_bytes_peak"] == 3 * PAGE_SIZE


def test_same_seed_gives_the_same_result_and_another_one_another() -> None:
    def guest(guest: Guest) -> Steps:
        for _ in range(20):
            yield Share(guest.random_area(4 * PAGE_SIZE))
            yield Wait(guest.rng.random())

    first, same, other = (done(by=guest, seed=seed) for seed in (7, 7, 8))

    assert first == same
    assert first.figures != other.figures


def test_parameters_in_words_become_what_is_declared() -> None:
    def guest(guest: Guest, size: int, often: int = 1) -> Steps:
        for _ in range(often):
            yield Share(guest.allocate(size))

    figures = done(by=guest, parameters={"size": "8K", "often": 3}).figures

    assert figures["converted_bytes"] == 3 * 8192


def endless(guest: Guest) -> Steps:
    while True:
        yield Wait(0.0)


def absurd(step: Any) -> Callable[[Guest], Steps]:
    def guest(guest: Guest) -> Steps:
        yield Wait(0.25)
        yield step

    return guest


def raising(guest: Guest) -> Steps:
    yield Wait(0.0)
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (endless, "has made 1000 steps and goes on"),
        (absurd(Share(Range(0, 100))), "its area is Range(start, size) of whole 4 KiB pages"),
        (absurd(Share(Range(-4096, 4096))), "in 64 bits"),
        (absurd(Unshare(Range(0, 1 << 64))), "in 64 bits"),
        (absurd(Share((1, 2, 3))), "in 64 bits"),  # type: ignore[arg-type]
        (absurd(Io("disk", "there")), "in 64 bits"),  # type: ignore[arg-type]
        (absurd(Wait(-1.0)), "give 0 or more seconds"),
        (absurd(Wait(float("nan"))), "give 0 or more seconds"),
        (absurd(Wait(1e30)), "give 0 or more seconds"),
        (absurd(5), "yielded 5, which is no step"),
        (raising, "raised KeyError('lost')"),
    ],
)
def test_scenario_that_cannot_go_on_is_one_line_with_the_step(
    by: Callable[[Guest], Steps], words: str
) -> None:
    with pytest.raises(ScenarioError) as caught:
        done(by=by, most_steps=1000)

    text = str(caught.value)
    assert words in text
    assert text.startswith(f"scenario {by.__name__}, step ")
    assert "\n" not in text


def test_policy_that_raises_is_told_as_in_a_run() -> None:
    class Broken(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            raise ZeroDivisionError

    def guest(guest: Guest) -> Steps:
        yield Share(area(0))

    with pytest.raises(PolicyError, match=r"policy Broken: on_share for .* raised") as caught:
        done(Broken(), by=guest)

    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_quota_holds_against_a_guest_that_asks_for_more() -> None:
    def guest(guest: Guest) -> Steps:
        for page in range(32):
            yield Share(area(page))

    figures = done(Quota(5 * PAGE_SIZE), by=guest).figures

    assert figures["shared_bytes_peak"] == 5 * PAGE_SIZE
    assert figures["denied"] == 27


@pytest.mark.parametrize("who", ["scenario waits_for_ever, step 2,", "policy Sleeps: on_share"])
def test_who_does_not_return_is_told(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    goes_on = threading.Event()

    def hear(line: str) -> None:
        told.append(line)
        goes_on.set()

    class Sleeps(Policy):
        def on_share(self, event: Event, view: View) -> Decision:
            if who.startswith("policy"):
                goes_on.wait()
            return Allow()

    def waits_for_ever(guest: Guest) -> Steps:
        yield Wait(1.0)
        if who.startswith("scenario"):
            goes_on.wait()
        yield Share(area(0))

    monkeypatch.setattr(watch, "tell", hear)
    monkeypatch.setattr(running, "WATCH", watch.Watch(0.02))

    done(Sleeps(), by=waits_for_ever)

    assert len(told) == 1
    assert told[0].startswith(who)
    assert told[0].endswith("has not returned for 0.02 s; Ctrl-C ends the run")


def test_run_that_stands_still_is_found_once() -> None:
    class Standing:
        steps = 5
        silent = "it"

    run, looks = Standing(), watch.Watch(1e6)

    with looks.over(run):
        first, second, third = (looks._standing_still() for _ in range(3))

    assert (first, second, third) == ([], [run], [])


def test_run_that_gets_on_is_not_found() -> None:
    class Going:
        steps = 0
        silent = "it"

    run, looks = Going(), watch.Watch(1e6)

    with looks.over(run):
        for _ in range(3):
            assert looks._standing_still() == []
            run.steps += 1
