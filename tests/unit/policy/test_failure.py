"""What the author of a policy that raises gets to see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest

from vmm.core.events import Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.policy import Policy, PolicyError, View
from vmm.policy.failure import explain, scope
from vmm.policy.hooks import Hooks
from vmm.policy.loader import load_policy

VIEW = cast(View, object())
AREA = Range(0x8000, PAGE_SIZE)

MINE = """
from vmm.policy import Partial, Policy, Range

class Mine(Policy):
    def on_share(self, event, view):
        what = self.part(event)
        return what

    def part(self, event):
        return Partial(Range(1, 2))  # refused inside vmm.policy

    def on_unshare(self, event, view):
        try:
            return self.part(event)
        except ValueError as error:
            raise KeyError("second") from error
"""


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    (tmp_path / "mine.py").write_text(MINE)
    return load_policy(f"{tmp_path}/mine.py:Mine")


def failure(policy: Policy, kind: Kind) -> PolicyError:
    with pytest.raises(PolicyError) as raised:
        Hooks([policy]).decide(kind, AREA, 2, "hypercall", VIEW)
    return raised.value


def test_explanation_has_the_event_and_no_frame_of_ours(policy: Policy) -> None:
    text = explain(failure(policy, Kind.SHARE))

    assert text.startswith("  event: share [0x8000, 0x9000), 4 KiB, by vCPU 2, hypercall\n")
    assert re.findall(r"mine.py\", line \d+, in (\w+)", text) == ["on_share", "part"]
    assert "vmm/" not in text
    assert re.search(r"\nValueError: Partial.*whole 4 KiB pages", text)


def test_explanation_tells_what_led_to_the_exception_too(policy: Policy) -> None:
    text = explain(failure(policy, Kind.UNSHARE))

    assert re.findall(r"in (\w+)\n", text) == ["on_unshare", "part", "on_unshare"]
    assert "vmm/" not in text
    assert "direct cause" in text and text.endswith("KeyError: 'second'\n")


def test_prompts_scope_has_event_view_policy_exception_and_local_variables(policy: Policy) -> None:
    names = scope(failure(policy, Kind.SHARE))

    assert names["event"].area == AREA
    assert names["view"] is VIEW
    assert names["policy"] is policy
    assert isinstance(names["exception"], ValueError)
    assert names["local"]["self"] is policy
    assert set(names) == {"event", "view", "policy", "exception", "local"}


def test_answer_that_does_not_fit_is_in_scope_though_nothing_was_raised() -> None:
    class Wrong(Policy):
        def on_share(self, event: object, view: object) -> None:  # type: ignore[override]
            return None

    error = failure(Wrong(), Kind.SHARE)

    assert explain(error) == ""
    assert scope(error)["exception"] is error
    assert scope(error)["event"].kind is Kind.SHARE
