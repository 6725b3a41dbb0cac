"""What policies know, in a snapshot: by whom it is found again, and what is refused."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.conversion import RecordingScheme, share, unshare
from tests.support.memory import guest_memory, pages
from tests.support.saved import mutations
from vmm.conversion.transaction import Converter
from vmm.core.saved import MOST_OWN, BadState, NotSaved, Saved, own_state
from vmm.memory.guest_memory import GuestMemory
from vmm.policy import Allow, Decision, Deny, End, Event, Policy, PolicyError, View, builtin
from vmm.policy.builtin import AllowAll, Audit, DenyAfterBoot, Quota, RateLimit
from vmm.policy.hooks import Hooks
from vmm.policy.keeping import (
    MOST_POLICIES,
    read_policies,
    restore_policies,
    saved_policies,
)

BURST = 4


class Clock:
    """A view of which policies use the time alone."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now


def view(now: float = 100.0) -> View:
    made: Any = Clock(now)
    found: View = made
    return found


def saved(*policies: Policy, now: float = 100.0) -> Any:
    """Their states, as they come back from a file."""
    hooks = Hooks(policies)
    hooks.boot(view(now=90.0))
    return json.loads(json.dumps(saved_policies(hooks, view(now))))


def restored(rows: Any, *policies: Policy, now: float = 5.0) -> list[str]:
    """Give them to other policies; the names of those that are gone."""
    hooks = Hooks(policies)
    hooks.boot(view(now))
    found = Saved({"policies": rows}, "state")
    read = read_policies(found)
    found.finish()
    return restore_policies(hooks, read, view(now))


class Counting(Policy):
    """Knows a number."""

    def __init__(self, number: object = 0) -> None:
        self.number = number

    def on_save(self, view: View) -> object:
        return self.number

    def on_restore(self, state: Any, view: View) -> None:
        self.number = state


class Others(Policy):
    """Asks others."""

    def __init__(self, *others: Any) -> None:
        self.others = others

    def wrapped_policies(self) -> Sequence[Policy]:
        return self.others


# --- who gets what ---


def test_policies_are_named_in_their_order_with_what_they_know() -> None:
    rows = saved(Quota(4096), Counting(7), DenyAfterBoot(5))

    assert rows == [
        {"policy": "vmm.policy.builtin.quota:Quota", "state": None},
        {"policy": f"{__name__}:Counting", "state": 7},
        {
            "policy": "vmm.policy.builtin.deny_after_boot:DenyAfterBoot",
            "state": {"seconds": 10.0, "unshared": False},
        },
    ]


def test_state_goes_to_the_same_place_among_the_policies_of_the_class() -> None:
    rows = saved(Counting(1), AllowAll(), Counting(2))
    first, second, third = Counting(), Counting(), Counting()

    gone = restored(rows, Quota(1), first, second, third)

    assert [first.number, second.number, third.number] == [1, 2, 0]
    assert gone == ["AllowAll"]


def test_policies_that_the_run_does_not_name_are_told_whether_or_not_they_knew_something() -> None:
    assert restored(saved(Quota(1), Counting(1), DenyAfterBoot())) == [
        "Quota", "Counting", "DenyAfterBoot",
    ]  # fmt: skip


def test_wrapped_policy_is_found_whether_or_not_it_is_wrapped_then() -> None:
    rows = saved(Others(Counting(1), Others(Counting(2))))
    plain = Counting()
    inner = Counting()

    assert restored(rows, plain, Others(inner)) == ["Others"]

    assert (plain.number, inner.number) == (1, 2)


def test_policy_that_two_others_wrap_is_saved_once_and_nobody_s_policy_never() -> None:
    one = Counting(1)

    rows = saved(Others(one, Policy()), Others(one), one)

    assert [row["state"] for row in rows] == [None, 1, None]


def test_policy_without_a_state_in_the_snapshot_begins_as_in_any_run() -> None:
    policy = Counting(3)

    assert restored(saved(Counting(None)), policy) == []
    assert restored([], policy) == []

    assert policy.number == 3


# --- what is refused ---


def endless() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def doubled(depth: int) -> list[Any]:
    """Small in memory, large in JSON."""
    made: list[Any] = []
    for _ in range(depth):
        made = [made] * 100
    return made


UNFIT: dict[str, tuple[object, str]] = {
    "set": ({1}, "has what JSON can't hold: {1}"),
    "object": ([object()], "has what JSON can't hold: <object"),
    "bytes": (b"x", "has what JSON can't hold"),
    "nan": ({"a": math.nan}, "has nan, which is no number"),
    "infinity": (math.inf, "has inf, which is no number"),
    "keys": ({1: 2}, "has a key that is no text: 1"),
    "long number": (-(1 << 64), "has a number of more than 64 bits"),
    "deep": (endless(), "is nested more than 16 deep"),
    "large": ("x" * MOST_OWN, f"has {MOST_OWN + 2} bytes of JSON"),
    "often the same": (doubled(10), f"has more than {MOST_OWN} bytes"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_state_that_is_no_small_json_refuses_the_snapshot_and_names_the_policy(name: str) -> None:
    state, why = UNFIT[name]

    with pytest.raises(NotSaved) as refusal:
        saved(Counting(1), Others(Counting(state)))

    said = str(refusal.value)
    assert said.startswith("policy Counting: what on_save returned " + why)
    assert said.endswith("; the snapshot is not made, and the guest goes on")
    assert "\n" not in said and len(said) < 300


def test_what_json_can_hold_comes_back_as_it_was() -> None:
    state = {"a": [1, -2.5, "x\ud800", None, True], "": {}, "big": (1 << 64) - 1, "t": (1, 2)}

    assert own_state(state) == {**state, "t": [1, 2]}


class Broken(Counting):
    def on_save(self, view: View) -> object:
        raise OSError("no\nidea")


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Broken(), r"policy Broken: on_save raised OSError\('no\\nidea'\)"),
        (Others(3), r"policy Others: wrapped_policies returned \(3,\); return a list of policies"),
        (Others(*(Counting(n) for n in range(MOST_POLICIES))), "has 64 policies at most"),
    ],
)
def test_policy_that_breaks_refuses_the_snapshot(policy: Policy, why: str) -> None:
    with pytest.raises(NotSaved, match=why + "; the snapshot is not made, and the guest goes on"):
        saved(policy)


class Choosy(Counting):
    """Raises what it is told."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def on_restore(self, state: Any, view: View) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ValueError("x" * 1000), "ValueError: xxx"),
        (TypeError("not\nthis"), "TypeError: not"),
        (KeyError("tokens"), "KeyError: 'tokens'"),
    ],
)
def test_state_that_its_policy_refuses_is_a_bad_snapshot(error: Exception, why: str) -> None:
    with pytest.raises(BadState) as refusal:
        restored(saved(Choosy(error)), Choosy(error))

    said = str(refusal.value)
    assert said.startswith("state.policies[0]: policy Choosy can't go on from its state: " + why)
    assert refusal.value.exit_status == 2 and len(said) < 400


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), OSError(5, "x"), SystemExit(3)])
def test_policy_that_breaks_while_it_is_restored_is_the_policy_s_fault(error: Any) -> None:
    with pytest.raises(PolicyError, match="policy Choosy: on_restore raised") as broken:
        restored(saved(Choosy(error)), Choosy(error))

    assert broken.value.__cause__ is error


def builtins(folder: Path) -> list[Policy]:
    """Those that have something to keep."""
    inner = RateLimit(per_second=2, burst=BURST)
    return [DenyAfterBoot(seconds=3), DenyAfterBoot(), Audit(folder / "log", inner)]


def test_hostile_states_of_the_built_in_policies_are_refused_or_taken(tmp_path: Path) -> None:
    policies, refused = builtins(tmp_path), 0
    rows = saved(*policies)
    Hooks(policies).exit(End("poweroff", ""), view())
    for what, changed in mutations({"policies": rows}):
        hooks = Hooks(builtins(tmp_path))
        hooks.boot(view())
        try:
            found = Saved(changed, "state")
            restore_policies(hooks, read_policies(found), view())
            found.finish()
        except BadState as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, what
            refused += 1
        for policy in hooks.policies:
            assert policy.on_save(view()) is not None, what
        hooks.exit(End("poweroff", ""), view())
    assert refused > 100


def test_tokens_beyond_the_burst_of_this_run_are_not_taken_over() -> None:
    rows = saved(RateLimit(per_second=1, burst=9))
    policy = RateLimit(per_second=1, burst=2)

    restored(rows, policy)

    assert policy.on_save(view(now=5.0)) == {"tokens": 2.0}


# --- a run cut in two ---


class Run:
    """A converter over real memory; a sixty-fourth of a second is exact in every clock of these."""

    def __init__(self, memory: GuestMemory, policy: Policy, began: float) -> None:
        self.now = began
        self.policy = policy
        self.converter = Converter(memory, RecordingScheme(memory), policy, clock=lambda: self.now)
        self.hooks.boot(self.converter.view)

    @property
    def hooks(self) -> Hooks:
        return self.converter.hooks

    def answers(self, steps: Sequence[tuple[int, bool, int]]) -> list[int]:
        """Each step: how long to wait, whether to share, and the page."""
        found = []
        for wait, is_share, page in steps:
            self.now += wait / 64
            found.append(self.converter.convert((share if is_share else unshare)(page, 2)))
        return found

    def end(self) -> None:
        self.hooks.exit(End("poweroff", ""), self.converter.view)


def log_of(path: Path) -> list[Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "exit" not in line]


MAKE: dict[str, Callable[[Path], Policy]] = {
    "DenyAfterBoot": lambda log: DenyAfterBoot(),
    "DenyAfterBoot by time": lambda log: DenyAfterBoot(seconds=1.5),
    "RateLimit": lambda log: RateLimit(per_second=2, burst=BURST),
    "Audit": Audit,
    "Audit of RateLimit": lambda log: Audit(log, RateLimit(per_second=0.5, burst=2)),
    "Audit of DenyAfterBoot": lambda log: Audit(log, DenyAfterBoot(seconds=2.0)),
}
STEP = st.tuples(st.sampled_from([0, 1, 16, 32, 64, 200]), st.booleans(), st.integers(0, 60))


@pytest.mark.parametrize("name", MAKE)
@given(steps=st.lists(STEP, max_size=24), data=st.data())
@settings(deadline=None, max_examples=40)
def test_run_that_is_saved_and_restored_decides_like_one_that_is_not(
    tmp_path_factory: pytest.TempPathFactory, name: str, steps: list[Any], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(steps)), "cut")
    rest = data.draw(st.sampled_from([0, 7, 640]), "time until the snapshot") / 64
    began = data.draw(st.sampled_from([0.0, 3.0, 65536.0]), "the other run's clock")
    folder = tmp_path_factory.mktemp("cut")
    logs = [folder / each for each in ("whole", "first", "second")]
    with ExitStack() as stack:
        memories = [stack.enter_context(guest_memory(pages(32, 32))) for _ in range(2)]
        whole = Run(memories[0], MAKE[name](logs[0]), 100.0)
        expected = whole.answers(steps[:cut])
        whole.now += rest
        expected += whole.answers(steps[cut:])

        first = Run(memories[1], MAKE[name](logs[1]), 100.0)
        answers = first.answers(steps[:cut])
        first.now += rest
        rows = json.loads(json.dumps(saved_policies(first.hooks, first.converter.view)))
        second = Run(memories[1], MAKE[name](logs[2]), began)
        read = read_policies(Saved({"policies": rows}, "state"))
        gone = restore_policies(second.hooks, read, second.converter.view)
        answers += second.answers(steps[cut:])
        for run in (whole, first, second):
            run.end()

    assert gone == []
    assert answers == expected
    if "Audit" in name:
        assert log_of(logs[1]) + log_of(logs[2]) == log_of(logs[0])


def test_every_built_in_policy_that_saves_something_is_cut_in_two(tmp_path: Path) -> None:
    keeping = {name for name in builtin.__all__ if "on_save" in vars(getattr(builtin, name))}

    assert keeping == {word for name in MAKE for word in name.split() if word[0].isupper()}


def test_saving_changes_nothing_for_the_run_that_goes_on() -> None:
    policy = RateLimit(per_second=1, burst=2)
    event: Any = None
    asked: list[Decision] = [policy.on_share(event, view(10.0)) for _ in range(3)]

    policy.on_save(view(10.5))
    asked += [policy.on_share(event, view(11.0)) for _ in range(2)]

    refused = Deny(errno.EBUSY)
    assert asked == [Allow(), Allow(), refused, Allow(), refused]


def test_time_away_earns_no_tokens() -> None:
    policy = RateLimit(per_second=1, burst=2)
    event: Event | Any = None
    for _ in range(2):
        policy.on_share(event, view(90.0))
    again = RateLimit(per_second=1, burst=2)

    restored(json.loads(json.dumps(saved_policies(Hooks([policy]), view(90.0)))), again, now=5e6)

    assert again.on_share(event, view(5e6)) == Deny(errno.EBUSY)
