"""--policy-arg: words become what the constructor declares, or one line that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from vmm.core.errors import UsageError
from vmm.policy import Policy
from vmm.policy.arguments import bind
from vmm.policy.builtin import Audit, Quota
from vmm.policy.loader import load_policy


class Typed(Policy):
    def __init__(
        self,
        number: int = 0,
        share: float = 0.0,
        flag: bool = False,
        name: str = "",
        path: Path | None = None,
        mode: Literal["soft", "hard"] = "soft",
        *,
        either: int | str = 0,
    ) -> None: ...


class Untyped(Policy):
    def __init__(self, number=1): ...  # type: ignore[no-untyped-def]  # the point


def load(spec: str, words: Any) -> object:
    return (spec, list(words))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("number=3", 3),
        ("number=-3", -3),
        ("number=0x10", 16),
        ("number=80M", 80 << 20),
        ("share=0.5", 0.5),
        ("flag=yes", True),
        ("flag=False", False),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("path=/x/y", Path("/x/y")),
        ("path=none", None),
        ("mode=hard", "hard"),
        ("either=7", 7),
        ("either=seven", "seven"),
    ],
)
def test_word_becomes_a_value_of_the_declared_type(word: str, value: object) -> None:
    bound = bind(Typed, [word], load)

    assert list(bound.values()) == [value]
    assert type(bound[word.partition("=")[0]]) is type(value)


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (Typed, ["number=many"], "number=many: Typed wants int: a number, or a size as in 80M"),
        (Typed, ["number=1.5"], "wants int"),
        (Typed, ["share=half"], "wants float"),
        (Typed, ["flag=maybe"], "wants bool: yes or no"),
        (Typed, ["mode=other"], "'soft', 'hard'"),
        (Typed, ["number"], "number: write NAME=VALUE"),
        (Typed, ["=3"], "write NAME=VALUE"),
        (Typed, ["size=3"], "Typed takes number, share, flag"),
        (Typed, ["number=1", "number=2"], "number is given twice"),
        (Typed, ["number=1", "number.x=2"], "number is not a policy"),
        (Policy, ["number=1"], "Policy takes none at all"),
        (Untyped, ["number=1"], "Untyped declares no type for number"),
        (Quota, [], "Quota needs limit; give it with --policy-arg limit=VALUE"),
        (Audit, ["file=x", "of.limit=3"], "of=MODULE:CLASS is missing"),
    ],
)
def test_bad_word_is_refused_with_the_remedy(
    make: type[Policy], words: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as raised:
        bind(make, words, load)

    assert message in str(raised.value)


def test_policy_parameter_is_loaded_with_its_own_words() -> None:
    bound = bind(Audit, ["file=log", "of=m:C", "of.limit=3", "of.of.limit=4"], load)

    assert bound == {"file": Path("log"), "of": ("m:C", ["limit=3", "of.limit=4"])}


def test_constructor_that_refuses_a_value_is_one_line() -> None:
    with pytest.raises(
        UsageError, match=r"^--policy .*Quota: Quota.* failed: ValueError.*limit=-1"
    ):
        load_policy("vmm.policy.builtin:Quota", ["limit=-1"])
