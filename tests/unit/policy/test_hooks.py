"""Several policies in a row, boot and exit, and answers that are none."""

from __future__ import annotations

import errno
import threading
from typing import Any, cast

import pytest

from tests.support.conversion import Answering
from tests.support.memory import pages
from vmm.core.errors import AccessDenied
from vmm.core.events import Kind
from vmm.core.ranges import Range
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
    Partial,
    Policy,
    PolicyError,
    PolicyKill,
    View,
)
from vmm.policy.hooks import Hooks
from vmm.policy.protocol import BrokenOff

VIEW = cast(View, None)
AREA = pages(0, 8)
LATER = Defer(5.0)
MORE = Convert(pages(0, 9))


def decide(*answers: object) -> Decision:
    policies = [Answering(answer) for answer in answers]
    return Hooks(policies).decide(Kind.UNSHARE, AREA, 0, "test", VIEW)


class First(Answering):
    """Told apart from Second by its name."""


class Second(Answering):
    """Told apart from First by its name."""


@pytest.mark.parametrize(
    ("first", "second", "by"),
    [
        (Allow(), Allow(), None),
        (Allow(), Deny(), "Second"),
        (Deny(), Allow(), "First"),
        (LATER, Deny(), "Second"),
        (LATER, MORE, "First"),
        (LATER, Partial(pages(0, 4)), "Second"),
    ],
    ids=repr,
)
def test_decision_is_somebodys_word(first: Decision, second: Decision, by: str | None) -> None:
    hooks = Hooks([First(first), Second(second)])
    hooks.decide(Kind.UNSHARE, AREA, 0, "test", VIEW)

    assert hooks.decided_by == by


def test_decision_of_the_next_request_is_nobodys_word_again() -> None:
    first = First(Deny())
    hooks = Hooks([first])
    hooks.decide(Kind.UNSHARE, AREA, 0, "test", VIEW)
    first.answer = Allow()
    hooks.decide(Kind.UNSHARE, AREA, 0, "test", VIEW)

    assert hooks.decided_by is None


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        ((), Allow()),
        ((Allow(), Allow()), Allow()),
        ((Allow(2.0), Allow(), Allow(3.0)), Allow(2.0)),
        ((Allow(0), Deny()), Deny()),
        ((Allow(0), LATER), Defer(5.0, patience=0)),
        ((Allow(), Deny(errno.EBUSY), Deny()), Deny(errno.EBUSY)),
        ((LATER, Deny()), Deny()),
        ((Partial(pages(0, 4)), Kill("x")), Kill("policy Answering: x")),
        ((LATER, MORE), LATER),
        ((MORE, LATER), MORE),
        ((LATER, Partial(pages(0, 4))), Partial(pages(0, 4), later=LATER)),
        ((Partial(pages(0, 4)), LATER), Partial(pages(0, 4), later=LATER)),
        ((Partial(pages(0, 4)), Partial(pages(1, 2))), Partial(pages(1, 2))),
    ],
    ids=repr,
)
def test_decisions_in_a_row_become_one(answers: tuple[Decision, ...], result: Decision) -> None:
    assert decide(*answers) == result


def test_refusal_ends_the_round() -> None:
    after = Answering(Allow())

    Hooks([Answering(Deny()), after]).decide(Kind.SHARE, AREA, 0, "test", VIEW)

    assert after.asked == []


def test_policy_after_a_partial_is_asked_about_the_part() -> None:
    after = Answering(Allow())

    Hooks([Answering(Partial(pages(2, 3))), after]).decide(Kind.SHARE, AREA, 0, "test", VIEW)

    assert [event.area for event in after.asked] == [pages(2, 3)]


def test_part_of_a_later_policy_must_lie_in_the_part_of_an_earlier() -> None:
    with pytest.raises(PolicyError, match="part of the request"):
        decide(Partial(pages(0, 2)), Partial(pages(1, 2)))


class Watching(Policy):
    def __init__(self, answer: object = None) -> None:
        self.answer = answer or Allow()
        self.ends: list[End] = []

    def on_boot(self, view: View) -> Decision:
        return cast(Decision, self.answer)

    def on_exit(self, end: End, view: View) -> None:
        self.ends.append(end)
        if isinstance(self.answer, BaseException):
            raise self.answer


def test_boot_may_be_refused_with_kill_and_its_reason() -> None:
    with pytest.raises(PolicyKill, match="policy Watching: not this one"):
        Hooks([Watching(), Watching(Kill("not this one"))]).boot(VIEW)


@pytest.mark.parametrize("answer", [Deny(), True, LATER])
def test_other_answer_to_boot_is_the_policys_fault(answer: object) -> None:
    with pytest.raises(PolicyError, match=r"Watching: on_boot returned .*Kill\(reason\)"):
        Hooks([Watching(answer)]).boot(VIEW)


def test_every_policy_hears_of_the_exit_also_after_one_that_raises() -> None:
    policies = [Watching(ValueError("first")), Watching()]

    with pytest.raises(PolicyError, match="Watching: on_exit raised ValueError"):
        Hooks(policies).exit(End("poweroff", ""), VIEW)

    assert policies[1].ends == [("poweroff", "")]


class Exiting(Policy):
    def on_boot(self, view: View) -> Decision:
        raise SystemExit(0)


def test_policy_that_exits_at_boot_or_exit_is_blamed() -> None:
    with pytest.raises(PolicyError, match="Exiting: on_boot raised SystemExit"):
        Hooks([Exiting()]).boot(VIEW)
    with pytest.raises(PolicyError, match="Watching: on_exit raised SystemExit"):
        Hooks([Watching(SystemExit(0))]).exit(End("poweroff", ""), VIEW)


class Interrupting(Policy):
    def __init__(self, error: BaseException) -> None:
        self._error = error

    def on_share(self, event: Event, view: View) -> Decision:
        raise self._error

    def on_boot(self, view: View) -> Decision:
        raise self._error


def test_policy_that_raises_keyboard_interrupt_is_blamed() -> None:
    hooks = Hooks([Interrupting(KeyboardInterrupt())])

    with pytest.raises(PolicyError, match=r"Interrupting: on_share .* raised KeyboardInterrupt"):
        hooks.decide(Kind.SHARE, Range(0, 4096), 0, "port", VIEW)


def test_hook_that_a_signal_breaks_off_is_not_blamed() -> None:
    with pytest.raises(BrokenOff):
        Hooks([Interrupting(BrokenOff())]).decide(Kind.SHARE, Range(0, 4096), 0, "port", VIEW)
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C before the run's own handlers are there
        Hooks([Interrupting(KeyboardInterrupt())]).boot(VIEW)


def test_hook_is_named_while_it_is_being_waited_for_and_no_longer() -> None:
    names: list[str | None] = []

    class Looking(Policy):
        def on_boot(self, view: View) -> Decision:
            names.append(hooks.waiting_for)
            return Allow()

        def on_share(self, event: Event, view: View) -> Decision:
            names.append(hooks.waiting_for)
            raise ValueError

    hooks = Hooks([Looking()])

    hooks.boot(VIEW)
    with pytest.raises(PolicyError):
        hooks.decide(Kind.SHARE, AREA, 0, "test", VIEW)

    assert names == ["policy Looking: on_boot", f"policy Looking: on_share for {AREA}"]
    assert hooks.waiting_for is None


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Partial(Range(1, 4096)), "whole 4 KiB pages"),
        (lambda: Partial(pages(0, 1), 0), "errno"),
        (lambda: Partial(pages(0, 1), cast(Any, 1.5)), "errno"),
        (lambda: Convert(Range(0, 0)), "whole 4 KiB pages"),
        (lambda: Defer(float("nan")), "time in seconds"),
        (lambda: Allow(-1), "number of seconds"),
        (lambda: Allow(float("nan")), "number of seconds"),
        (lambda: Allow(cast(Any, "long")), "number of seconds"),
        (lambda: Defer(cast(Any, "soon")), "time in seconds"),
        (lambda: Defer(1.0, patience=-1), "number of seconds"),
        (lambda: Partial(pages(0, 1), patience=-1), "number of seconds"),
        (lambda: Convert(pages(0, 1), patience=-1), "number of seconds"),
    ],
)
def test_senseless_decision_cannot_be_made(make: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


def test_decisions_are_equal_when_they_say_the_same() -> None:
    assert Deny() == Deny(errno.EACCES)
    assert Deny() != Deny(errno.EPERM)
    assert Allow() != Deny() and Allow() != Allow(0)
    assert len({Allow(), Allow(), LATER, Defer(5.0), Defer(5.0, keep=True)}) == 3
    assert repr(Deny(13)) == "Deny(errno=13)"
    assert repr(Allow()) == "Allow()" and repr(Allow(1.0)) == "Allow(patience=1.0)"
    assert repr(Defer(5.0, patience=0)) == "Defer(keep=False, patience=0, until=5.0)"


def test_hook_that_is_not_overridden_is_not_called() -> None:
    """It would cost every conversion of every run without a policy."""
    hooks = Hooks([Policy(), Watching()])

    assert set(hooks._asked.values()) == set(hooks._faults.values()) == {()}
    assert hooks.watcher(VIEW, "blk0") is None
    assert len(hooks._boot) == len(hooks._exit) == 1


# -- accesses of devices --------------------------------------------------------------------------


class Io(Policy):
    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked: list[IoEvent] = []

    def on_io(self, event: IoEvent, view: View) -> Decision:
        self.asked.append(event)
        if isinstance(self.answer, Exception):
            raise self.answer
        return cast(Decision, self.answer)


def ask(*answers: object) -> list[Io]:
    policies = [Io(answer) for answer in answers]
    watcher = Hooks(policies).watcher(VIEW, "blk0")
    assert watcher is not None
    try:
        watcher(AREA, True, "ring")
    finally:
        assert all(p.asked == [IoEvent("blk0", AREA, True, "ring")] for p in policies[:1])
    return policies


def test_access_that_all_allow_happens() -> None:
    assert [len(policy.asked) for policy in ask(Allow(), Allow())] == [1, 1]


def test_access_that_one_denies_is_a_refused_access_to_memory() -> None:
    with pytest.raises(AccessDenied, match=r"policy Io keeps blk0 off \[0x0, 0x8000\)"):
        ask(Allow(), Deny())


def test_access_may_end_the_run() -> None:
    with pytest.raises(PolicyKill, match="policy Io: a stray"):
        ask(Kill("a stray"))


@pytest.mark.parametrize("answer", [LATER, MORE, Partial(AREA), None, True])
def test_other_answer_to_an_access_is_the_policys_fault(answer: object) -> None:
    with pytest.raises(PolicyError, match=r"Io: on_io for \[0x0, 0x8000\) returned"):
        ask(answer)


def test_os_error_of_on_io_is_blamed_and_not_taken_for_the_disks() -> None:
    with pytest.raises(PolicyError, match=r"on_io.*raised PermissionError"):
        ask(PermissionError("mine"))


def test_thread_knows_whether_it_is_in_a_hook() -> None:
    seen: list[bool] = []

    class Looking(Policy):
        def on_boot(self, view: View) -> Decision:
            seen.append(hooks.is_this_thread_in_one)
            other = threading.Thread(target=lambda: seen.append(hooks.is_this_thread_in_one))
            other.start()
            other.join()
            return Allow()

    hooks = Hooks([Looking()])
    hooks.boot(VIEW)

    assert [*seen, hooks.is_this_thread_in_one] == [True, False, False]
