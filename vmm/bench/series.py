"""What is measured: series of samples, taken in turns so that all subjects see the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Series(NamedTuple):
    """Samples of one subject in one case. Comparable with those of the same section and case.

    `unit` says what they are; all units are times or sizes, so that less is better.
    """

    section: str
    case: str
    subject: str
    unit: str
    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile; of few samples the smallest and the largest."""
        if len(self.samples) < 4:
            return min(self.samples), max(self.samples)
        quartiles = statistics.quantiles(self.samples, n=4)
        return quartiles[0], quartiles[2]

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "median": self.median}


class Ratio(NamedTuple):
    """How often faster a subject is than another one: per round, as both met the same noise."""

    median: float
    low: float
    high: float


def interleaved(
    section: str,
    case: str,
    unit: str,
    subjects: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    warm_up: bool = True,
) -> list[Series]:
    """Each round asks every subject once, in alternating order."""
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    if warm_up:
        for sample in subjects.values():
            sample()
    for number in range(rounds):
        order = list(subjects)
        for name in order if number % 2 == 0 else reversed(order):
            samples[name].append(subjects[name]())
    return [Series(section, case, name, unit, taken) for name, taken in samples.items()]


def speed_ratio(ours: Series, theirs: Series) -> Ratio:
    """Above 1: ours is faster."""
    pairs = zip(ours.samples, theirs.samples, strict=False)
    ratios = [their / our for our, their in pairs if our]
    whole = Series("", "", "", "", ratios)
    return Ratio(whole.median, *whole.spread)


def find(series: list[Series], section: str, case: str, subject: str) -> Series | None:
    """The series of that name, if it was taken."""
    for one in series:
        if (one.section, one.case, one.subject) == (section, case, subject):
            return one
    return None
