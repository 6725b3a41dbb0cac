"""Series: turns, medians and quartiles, ratios per round."""

from __future__ import annotations

import pytest

from vmm.bench.series import Series, find, interleaved, speed_ratio


def series(subject: str, *samples: float, section: str = "disk", case: str = "reads") -> Series:
    return Series(section, case, subject, "us", list(samples))


def test_interleaved_asks_in_turns_and_back_again() -> None:
    asked: list[str] = []

    def subject(name: str) -> float:
        asked.append(name)
        return float(len(asked))

    subjects = {name: lambda name=name: subject(name) for name in "abc"}
    taken = interleaved("s", "c", "us", subjects, 2)

    assert "".join(asked) == "abc" + "abc" + "cba"  # the first once over is thrown away
    assert [one.samples for one in taken] == [[4.0, 9.0], [5.0, 8.0], [6.0, 7.0]]


@pytest.mark.parametrize(
    ("samples", "median", "spread"),
    [
        ([3.0, 1.0, 2.0], 2.0, (1.0, 3.0)),
        ([1.0, 2.0, 3.0, 4.0, 100.0], 3.0, (1.5, 52.0)),
    ],
)
def test_series_has_a_median_and_quartiles(
    samples: list[float], median: float, spread: tuple[float, float]
) -> None:
    one = series("x", *samples)

    assert one.median == median
    assert one.spread == spread


def test_speed_ratio_goes_round_by_round() -> None:
    # The second round met a machine ten times as slow: it counts like the others.
    ratio = speed_ratio(series("ours", 1, 10, 2), series("theirs", 2, 20, 2))

    assert ratio == (2.0, 1.0, 2.0)


def test_find_wants_section_case_and_subject() -> None:
    all_of_them = [series("a"), series("b")]

    assert find(all_of_them, "disk", "reads", "b") is all_of_them[1]
    assert find(all_of_them, "disk", "writes", "b") is None
