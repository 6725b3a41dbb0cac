"""What a stack of policies answers to every pair of decisions: the table, by the cell."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from tests.support.conversion import Answering
from tests.support.memory import pages
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.policy import Allow, Convert, Decision, Defer, Deny, Kill, Partial, PolicyError, View
from vmm.policy.hooks import Hooks

PAGE = Path(__file__).parents[3] / "vmm" / "docs" / "reference" / "policies.md"
VIEW = cast(View, None)
AREA = pages(8, 8)


def from_to(one: Range, other: Range) -> Range:
    start, end = min(one.start, other.start), max(one.end, other.end)
    return Range(start, end - start)


NAMES = {
    "Allow": Allow, "Deny": Deny, "Partial": Partial, "Defer": Defer, "Convert": Convert,
    "Kill": Kill, "min": min, "from_to": from_to,
    "e1": errno.EPERM, "a1": pages(8, 4), "t1": 7.0, "k1": True, "w1": pages(6, 10), "r1": "one",
    "e2": errno.ENOSPC, "a2": pages(9, 2), "t2": 5.0, "k2": False, "w2": pages(8, 9), "r2": "two",
}  # fmt: skip


class Entry(NamedTuple):
    first: str
    then: str
    result: str


def table() -> list[Entry]:
    lines = iter(PAGE.read_text().splitlines())
    head = next(line for line in lines if line.startswith("| first, then |"))
    columns = _cells(head)[1:]
    assert set(next(lines)) <= set("|-")
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [
        Entry(first, then, result)
        for first, *results in map(_cells, rows)
        for then, result in zip(columns, results, strict=True)
    ]


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def value(text: str) -> Decision:
    return cast(Decision, eval(text, {"__builtins__": {}}, NAMES))


def with_patience(decision: Decision, patience: float | None) -> Decision:
    if isinstance(decision, (Deny, Kill)) or patience is None:
        return decision
    copied = value_of(decision)
    copied.patience = patience
    return copied


def value_of(decision: Decision) -> Allow:
    """Another one that says the same."""
    made = type(decision).__new__(type(decision))
    for name in type(decision).__slots__:
        setattr(made, name, getattr(decision, name))
    return cast(Allow, made)


TABLE = table()
PATIENCES = list(itertools.product((None, 0, 2.0, 9.0), repeat=2))


def test_table_has_every_pair() -> None:
    said = {entry.first.partition("(")[0] for entry in TABLE}

    assert said == {"Allow", "Deny", "Partial", "Defer", "Convert", "Kill"}
    assert len(TABLE) == len(said) ** 2
    assert {entry.then.replace("2", "1") for entry in TABLE} == {entry.first for entry in TABLE}


@pytest.mark.parametrize("patience", PATIENCES, ids=str)
@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.first}, {entry.then}")
def test_pair_comes_to_what_the_table_says(
    entry: Entry, patience: tuple[float | None, float | None]
) -> None:
    first = with_patience(value(entry.first), patience[0])
    then = with_patience(value(entry.then), patience[1])
    given = [p for p, d in zip(patience, (first, then), strict=True) if hasattr(d, "patience")]
    least = min((p for p in given if p is not None), default=None)
    expected = with_patience(value(entry.result), least)
    if isinstance(expected, Kill):
        expected = Kill(f"policy Answering: {expected.reason}")
    policies = [Answering(first), Answering(then)]

    decision = Hooks(policies).decide(Kind.UNSHARE, AREA, 0, "test", VIEW)

    assert decision == expected
    refused = isinstance(first, (Deny, Kill))
    asked = first.area if isinstance(first, Partial) else AREA
    assert [event.area for event in policies[1].asked] == ([] if refused else [asked])


def test_patience_in_the_middle_of_a_stack_is_kept() -> None:
    answers = [Defer(7.0, keep=True), Allow(2.0), Allow(), Partial(pages(8, 2)), Allow(3.0)]
    policies = [Answering(answer) for answer in answers]

    decision = Hooks(policies).decide(Kind.UNSHARE, AREA, 0, "test", VIEW)

    assert decision == Partial(pages(8, 2), later=Defer(7.0, keep=True), patience=2.0)


def test_part_of_a_share_cannot_be_put_off() -> None:
    policy = Answering(Partial(pages(8, 2), later=Defer(7.0)))

    with pytest.raises(PolicyError, match="only an unshare can be put off"):
        Hooks([policy]).decide(Kind.SHARE, AREA, 0, "test", VIEW)
