"""What a sweep has found: cells, what they come to over repetitions, and which policies no other
beats."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vmm.sweeps.jobs import Plan
from vmm.sweeps.store import Result

EXPOSED = "exposed_bytes_mean"
WAITED = "guest_ns"
REFUSED = "refused"
LABELS = {
    EXPOSED: "exposed to the host on average",
    WAITED: "the guest waits",
}


class CellResult(NamedTuple):
    """A cell of the grid and what came of it; `result` is None while it hasn't been run."""

    policy: str
    parameters: Mapping[str, str]
    policy_label: str
    workload: str
    kernel: str | None
    workload_parameters: Mapping[str, str]
    workload_label: str
    kind: str
    repetition: int
    seed: int
    result: Result | None

    @property
    def figures(self) -> Mapping[str, float]:
        """Those of `pyvmm replay --json`, and two derived ones: `exposed_bytes_mean`, shared or
        not discarded yet, and `refused`, requests that the guest was not granted in full."""
        if self.result is None or self.result.status != "ok":
            return {}
        found = dict(self.result.figures)
        found[EXPOSED] = found.get("shared_bytes_mean", 0) + found.get("deferred_bytes_mean", 0)
        found[REFUSED] = sum(found.get(name, 0) for name in ("denied", "partial", "lends_refused"))
        return found


class Spread(NamedTuple):
    """A figure over repetitions."""

    mean: float
    least: float
    most: float
    deviation: float
    """Standard deviation of the sample; 0 of a single one."""


class Group(NamedTuple):
    """All repetitions of one policy on one workload."""

    policy: str
    policy_label: str
    parameters: Mapping[str, str]
    workload_label: str
    kernel: str | None
    kind: str
    cells: int
    failed: int
    missing: int
    figures: Mapping[str, Spread]
    ended: tuple[str, ...]
    """Why guests ended otherwise than they wished, each reason once."""
    errors: tuple[str, ...]
    on_front: bool
    """It grants everything, and no other group of its workload that does is better in exposed bytes
    or waiting time without being worse in the other one."""
    on_front_of_all: bool
    """The same among all groups, whatever they refuse."""

    @property
    def counts(self) -> bool:
        """Whether it can be on the front: figures, and nothing refused or cut short."""
        return bool(self.figures) and not self.figures[REFUSED].most and not self.ended


class Results(NamedTuple):
    """A sweep's results, as far as there are any."""

    name: str
    cells: tuple[CellResult, ...]

    @property
    def failed(self) -> list[CellResult]:
        """Cells without figures, whose `result` has the error and the log."""
        return [each for each in self.cells if each.result and each.result.status == "failed"]

    @property
    def missing(self) -> int:
        """Cells that haven't been run."""
        return sum(each.result is None for each in self.cells)

    def groups(self) -> list[Group]:
        """By workload and policy, in the definition's order."""
        members: dict[tuple[str, str], list[CellResult]] = {}
        for each in self.cells:
            members.setdefault((each.workload_label, each.policy_label), []).append(each)
        made = [_group(cells) for cells in members.values()]
        workloads: dict[str, list[Group]] = {}
        for group in made:
            workloads.setdefault(group.workload_label, []).append(group)
        return [
            group._replace(on_front=granting, on_front_of_all=of_all)
            for groups in workloads.values()
            for group, granting, of_all in zip(
                groups, front(groups), front(groups, refusing=True), strict=True
            )
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, JSON-ready; keys stay, new ones may be added."""
        return {
            "sweep": self.name,
            "cells": [_cell_json(each) for each in self.cells],
            "groups": [
                {
                    **group._asdict(),
                    "figures": {name: each._asdict() for name, each in group.figures.items()},
                }
                for group in self.groups()
            ],
            "failed": len(self.failed),
            "missing": self.missing,
        }

    def as_csv(self) -> str:
        """A line for each cell, with a column for each parameter and figure."""
        parameters = _names(each.parameters for each in self.cells)
        others = _names(each.workload_parameters for each in self.cells)
        figures = _names(each.figures for each in self.cells)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["policy", *(f"policy.{name}" for name in parameters), "workload", "kernel",
             *(f"workload.{name}" for name in others), "repetition", "seed", "status", "ended",
             "error", "seconds", "worker", *figures]
        )  # fmt: skip
        for each in self.cells:
            found = each.result
            status = "missing" if found is None else found.status
            about: list[Any] = [""] * 4
            if found is not None:
                about = [found.ended or "", found.error or "", found.seconds, found.worker]
            writer.writerow(
                [each.policy, *(each.parameters.get(name, "") for name in parameters),
                 each.workload, each.kernel or "",
                 *(each.workload_parameters.get(name, "") for name in others),
                 each.repetition, each.seed, status, *about,
                 *(each.figures.get(name, "") for name in figures)]
            )  # fmt: skip
        return text.getvalue()


def collected(plan: Plan, stored: Mapping[str, Result]) -> Results:
    """The plan's cells with what is stored of them."""
    return Results(
        plan.definition.name,
        tuple(
            CellResult(
                policy=job.cell.policy.name,
                parameters=dict(job.cell.policy.parameters),
                policy_label=job.cell.policy.label,
                workload=job.cell.workload.name,
                kernel=job.cell.workload.kernel,
                workload_parameters=dict(job.cell.workload.parameters),
                workload_label=job.cell.workload.label,
                kind=job.cell.workload.kind,
                repetition=job.cell.repetition,
                seed=job.words["seed"],
                result=stored.get(job.key),
            )
            for job in plan.jobs
        ),
    )


def front(groups: Sequence[Group], *, refusing: bool = False) -> list[bool]:
    """Which of a workload's groups are on its Pareto front: exposed bytes against waiting time,
    by their means; equal ones are all on it. Of those that grant everything, or, `refusing`, of
    all."""
    points = [
        (group.figures[EXPOSED].mean, group.figures[WAITED].mean)
        if group.counts or (refusing and group.figures)
        else None
        for group in groups
    ]
    there = [point for point in points if point is not None]
    return [
        point is not None
        and not any(
            other[0] <= point[0] and other[1] <= point[1] and other != point for other in there
        )
        for point in points
    ]


def _group(cells: Sequence[CellResult]) -> Group:
    first = cells[0]
    found = [each.figures for each in cells if each.figures]
    results = [each.result for each in cells if each.result is not None]
    return Group(
        policy=first.policy,
        policy_label=first.policy_label,
        parameters=first.parameters,
        workload_label=first.workload_label,
        kernel=first.kernel,
        kind=first.kind,
        cells=len(cells),
        failed=sum(each.status == "failed" for each in results),
        missing=sum(each.result is None for each in cells),
        figures={name: _spread([each.get(name, 0) for each in found]) for name in _names(found)},
        ended=tuple(dict.fromkeys(each.ended for each in results if each.ended)),
        errors=tuple(dict.fromkeys(each.error for each in results if each.error)),
        on_front=False,
        on_front_of_all=False,
    )


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    least, most = min(values), max(values)
    # Rounding may put the mean of equal values beside them.
    return Spread(min(max(statistics.fmean(values), least), most), least, most, deviation)


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in mappings for name in each))


def _cell_json(cell: CellResult) -> dict[str, Any]:
    found = cell._asdict()
    result = found.pop("result")
    return {
        **found,
        "status": "missing" if result is None else result.status,
        "ended": result and result.ended,
        "error": result and result.error,
        "log": result and result.log,
        "worker": result and result.worker,
        "seconds": result and result.seconds,
        "tries": result and result.tries,
        "figures": dict(cell.figures),
    }
