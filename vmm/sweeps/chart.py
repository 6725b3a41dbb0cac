"""The geometry of a Pareto plot: which scale, which ticks, where the front runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from vmm.sweeps.results import EXPOSED, WAITED, Group

_WIDE = 30.0
"""How much larger than the least the most is where a logarithmic axis says more."""
COLOURS = (
    "#2563eb", "#ea580c", "#0d9488", "#8b5cf6", "#be185d", "#ca8a04", "#0891b2", "#65a30d",
    "#dc2626", "#475569", "#c026d3", "#15803d",
)  # fmt: skip
"""One for each policy, by its name; more policies begin anew."""


class Point(NamedTuple):
    """A group in the plot: waiting time to the right, exposed bytes upwards, least and most."""

    group: Group
    x: float
    y: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]


class Axis(NamedTuple):
    """`at` gives 0 to 1."""

    at: Callable[[float], float]
    ticks: Sequence[float]
    is_log: bool


def points(groups: Iterable[Group]) -> list[Point]:
    """Those that have figures."""
    made = []
    for group in groups:
        if group.figures:
            x, y = group.figures[WAITED], group.figures[EXPOSED]
            made.append(Point(group, x.mean, y.mean, (x.least, x.most), (y.least, y.most)))
    return made


def front_line(drawn: Sequence[Point], *, of_all: bool = False) -> list[tuple[float, float]]:
    """The corners of the front, from the shortest wait on: what lies above and to the right of it
    is beaten by a policy on it. With `of_all` the one of all policies, where it is another."""
    granting = {(point.x, point.y) for point in drawn if point.group.on_front}
    everyone = {(point.x, point.y) for point in drawn if point.group.on_front_of_all}
    if of_all and everyone == granting:
        return []
    corners: list[tuple[float, float]] = []
    for x, y in sorted(everyone if of_all else granting):
        if corners:
            corners.append((x, corners[-1][1]))
        corners.append((x, y))
    return corners


def colours(groups: Iterable[Group]) -> dict[str, str]:
    """By the policy's name."""
    names = dict.fromkeys(group.policy for group in groups)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def axis(ranges: Sequence[tuple[float, float]], base: int) -> Axis:
    """For values that reach over those ranges; ticks are round in powers of `base` (10, or 2 for
    bytes)."""
    least = min((low for low, _ in ranges), default=0.0)
    most = max((high for _, high in ranges), default=1.0) or 1.0
    if least > 0 and most / least > _WIDE:
        low, high = math.log(least / 1.3), math.log(most * 1.3)
        return Axis(
            lambda value: (math.log(value) - low) / (high - low),
            _log_ticks(least / 1.3, most * 1.3, base),
            True,
        )
    top = most * 1.08
    return Axis(lambda value: value / top, _linear_ticks(top, base), False)


def _log_ticks(low: float, high: float, base: int) -> list[float]:
    first, last = math.ceil(math.log(low, base)), math.floor(math.log(high, base))
    step = max(1, math.ceil((last - first + 1) / 8))
    return [float(base) ** power for power in range(first, last + 1, step)]


def _linear_ticks(top: float, base: int) -> list[float]:
    if base == 2:
        step = 2.0 ** math.ceil(math.log2(top / 6))
    else:
        raw = top / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= raw)
    return [step * number for number in range(int(top / step) + 1)]
