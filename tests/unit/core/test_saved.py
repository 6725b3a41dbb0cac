"""Values out of a saved state: of their type, in their bounds, and all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmm.core.saved import BadState, Saved


def test_values_come_out_as_what_they_are() -> None:
    saved = Saved(
        {"n": 5, "f": True, "t": "x", "b": "0aff", "m": {"n": 1}, "l": [{"n": 2}], "r": [[1, 2]]},
        "here",
    )

    assert (saved.number("n", 5), saved.flag("f"), saved.text("t")) == (5, True, "x")
    assert saved.bytes("b", 2) == b"\x0a\xff"
    assert saved.inner("m").number("n", 1) == 1
    assert [inner.number("n", 2) for inner in saved.each("l", 1)] == [2]
    assert saved.numbers("r", 2, 1, 2) == [(1, 2)]
    saved.finish()


@pytest.mark.parametrize(
    ("values", "ask", "why"),
    [
        ({}, lambda s: s.number("n", 1), "n is missing"),
        ({"n": True}, lambda s: s.number("n", 1), "n is no number"),
        ({"n": 2}, lambda s: s.number("n", 1), "n is 2, not 0 to 1"),
        ({"n": 10**400}, lambda s: s.number("n", 1), "n is a number of more than 64 bits"),
        ({"f": 1}, lambda s: s.flag("f"), "f is no flag"),
        ({"t": "xx"}, lambda s: s.text("t", 1), "t has 2 characters, 1 are the most"),
        ({"b": "0"}, lambda s: s.bytes("b", 1), "b is not in hexadecimal"),
        ({"b": "00"}, lambda s: s.bytes("b", 2), "b has 1 bytes, not 2"),
        ({"b": "0000"}, lambda s: s.bytes("b", most=1), "b is too long: 2 bytes"),
        ({"m": []}, lambda s: s.inner("m"), "m is no mapping"),
        ({"l": [1, 2]}, lambda s: s.rows("l", 1), "l has 2 entries, 1 are the most"),
        ({"l": []}, lambda s: s.each("l", 1), "l has 0 entries, not 1"),
        ({"l": [3]}, lambda s: s.each("l", 1), "no mapping of names"),
        ({"r": [[1]]}, lambda s: s.numbers("r", 2, 1, 9), r"r\[0\] is not 2 numbers up to 0x9"),
        ({"r": [[1, 10]]}, lambda s: s.numbers("r", 2, 1, 9), r"r\[0\] is not 2 numbers"),
    ],
)
def test_wrong_value_is_refused_with_its_name(
    values: dict[str, Any], ask: Callable[[Saved], object], why: str
) -> None:
    with pytest.raises(BadState, match=f"here.*{why}"):
        ask(Saved(values, "here"))


def test_value_that_nobody_asks_for_is_refused() -> None:
    saved = Saved({"n": 1, "other": None}, "here")
    saved.number("n", 1)

    with pytest.raises(BadState, match="here: 'other' is nothing that it has"):
        saved.finish()


def test_null_is_no_value_and_is_asked_for() -> None:
    saved = Saved({"n": None}, "here")

    assert not saved.has("n")
    saved.finish()
