"""A sweep from its definition to its results: what is stored counts, the rest is run."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmm.sweeps import content, jobs
from vmm.sweeps.content import Content
from vmm.sweeps.definition import Definition
from vmm.sweeps.executor import Executor, LocalExecutor, Snapshot, checked_workers
from vmm.sweeps.jobs import Job, Plan
from vmm.sweeps.pool import Runner
from vmm.sweeps.results import Results, collected
from vmm.sweeps.store import Result, Store
from vmm.sweeps.versions import pyvmm_version

_TICK = 0.5
"""Seconds after which somebody who waits is told how it stands."""


class Progress(NamedTuple):
    """How far a sweep is. `seconds_left` is None before anything says how long cells take."""

    cells: int
    stored: int
    """Cells with a result, those of earlier times included."""
    failed: int
    slots: int
    seconds_left: float | None


Told = Callable[[Progress], None]


class Prepared:
    """A sweep whose policies and workloads have been looked at; with the process that did it, which
    carries out cells after that."""

    def __init__(self, definition: Definition) -> None:
        """Raises UsageError for what is missing, unreadable, or doesn't load."""
        contents: dict[str, Content] = {}
        self.runner = Runner()
        self.snapshot = Snapshot(contents)
        try:
            self.plan = jobs.plan(definition, contents, self._check)
        except BaseException:
            self.close()
            raise

    def _check(self, parts: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
        for digest in content.needed(parts):
            self.snapshot.add(digest)
        return self.runner.check(parts, self.snapshot.places)

    def close(self) -> None:
        """End the process, remove the copies."""
        self.runner.close()
        self.runner.release()
        self.snapshot.close()


def run(
    prepared: Prepared,
    store: Store,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    told: Told = lambda progress: None,
) -> Results:
    """Run the cells that have no result in the store, and give all results.

    `scheduler` is a Dask scheduler's address, whose workers do it; else `workers` processes here.
    `told` hears how far it is. Whatever is raised, KeyboardInterrupt too, what has ended is stored.

    Raises UsageError for a scheduler that isn't there or doesn't fit, OutputError.
    """
    plan, number = prepared.plan, checked_workers(workers)
    store.begin(jobs.text_of(plan.definition), pyvmm_version(), plan.contents.values())
    statuses = store.statuses()
    todo = _todo(plan, statuses, retry_failed)
    count = _Count(plan, statuses, todo)
    if todo:
        with contextlib.closing(_executor(prepared, scheduler, min(number, len(todo)))) as executor:
            _carry_out(todo, executor, store, count, told)
    told(count.progress(0))
    return collected(plan, store.results())


def stored(plan: Plan, store: Store) -> Results:
    """The results that there are."""
    return collected(plan, store.results())


def _todo(plan: Plan, statuses: Mapping[str, str], retry_failed: bool) -> dict[str, Job]:
    """Jobs by key, each once: two cells may come to the same."""
    skipped = {"ok"} if retry_failed else {"ok", "failed"}
    return {job.key: job for job in plan.jobs if statuses.get(job.key) not in skipped}


def _executor(prepared: Prepared, scheduler: str | None, workers: int) -> Executor:
    for digest in prepared.plan.contents:
        prepared.snapshot.add(digest)
    places = prepared.snapshot.places
    if scheduler is None:
        return LocalExecutor(workers, places, prepared.runner)
    from vmm.sweeps.dask_executor import DaskExecutor

    prepared.runner.close()
    return DaskExecutor(scheduler, prepared.plan.contents, places)


def _carry_out(
    todo: Mapping[str, Job], executor: Executor, store: Store, count: _Count, told: Told
) -> None:
    waiting = deque(todo.values())
    open_jobs = dict(todo)

    def take(answers: list[Any]) -> None:
        for each in answers:
            job = open_jobs.pop(each.key, None)
            if job is None:
                continue  # it was carried out twice: the first counts
            result = _result(each)
            store.put(job.key, jobs.facts(job), content.needed(job.words), result)
            count.note(job, result)

    try:
        while open_jobs:
            room = max(min(executor.room, len(waiting)), 0)
            if room:
                executor.submit([waiting.popleft() for _ in range(room)])
            take(executor.take(_TICK))
            told(count.progress(executor.slots))
    except KeyboardInterrupt:
        take(executor.stop())
        raise


def _result(answer: Any) -> Result:
    found, seconds = answer.answer, float(answer.answer.get("seconds", 0.0))
    if "error" in found:
        return Result(
            "failed", {}, None, found["error"], found.get("log") or None, answer.worker, seconds, 1
        )
    return Result("ok", found["figures"], found["ended"], None, None, answer.worker, seconds, 1)


class _Count:
    """How far it is, and how long the rest may take: by what cells of a workload took so far."""

    def __init__(self, plan: Plan, statuses: Mapping[str, str], todo: Mapping[str, Job]) -> None:
        keys = {job.key for job in plan.jobs}
        self._cells = len(keys)
        self._stored = len(keys) - len(todo)
        self._failed = sum(statuses.get(key) == "failed" for key in keys if key not in todo)
        self._left: dict[str, int] = {}
        for job in todo.values():
            label = job.cell.workload.label
            self._left[label] = self._left.get(label, 0) + 1
        self._took: dict[str, tuple[int, float]] = {}
        self._began = time.monotonic()
        self._done = 0

    def note(self, job: Job, result: Result) -> None:
        """A cell has come to its end."""
        label = job.cell.workload.label
        self._left[label] -= 1
        number, seconds = self._took.get(label, (0, 0.0))
        self._took[label] = (number + 1, seconds + result.seconds)
        self._stored += 1
        self._done += 1
        self._failed += result.status == "failed"

    def progress(self, slots: int) -> Progress:
        """As of now."""
        return Progress(self._cells, self._stored, self._failed, slots, self._seconds_left(slots))

    def _seconds_left(self, slots: int) -> float | None:
        if not any(self._left.values()):
            return 0.0
        if not self._done or not slots:
            return None
        took = sum(seconds for _, seconds in self._took.values())
        usual = took / self._done
        work = 0.0
        for label, left in self._left.items():
            number, seconds = self._took.get(label, (0, 0.0))
            work += left * (seconds / number if number else usual)
        # What the cells took, against the time that passed: how many were really done at once.
        passed = time.monotonic() - self._began
        return work / max(took / passed, 1e-9) if took and passed else None
