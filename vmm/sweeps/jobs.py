"""A grid's cells as jobs: words that any machine with pyvmm can carry out, known by their content.

A job is JSON. Its key is a digest of all that decides its result, so that a result counts for as
long as that stays as it is: a changed policy has other jobs, and the rest of the sweep has not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmm.core.errors import UsageError
from vmm.sweeps import content
from vmm.sweeps.content import Content, place
from vmm.sweeps.definition import Cell, Definition, PolicyChoice, Workload, filled
from vmm.sweeps.versions import figures_digest, pyvmm_version

FORMAT = 1
"""Counts up when the same job comes to other figures, or to figures of another meaning."""


class Job(NamedTuple):
    """What one cell is. `words` go to whoever carries it out."""

    key: str
    cell: Cell
    words: Mapping[str, Any]


class Plan(NamedTuple):
    """All jobs of a sweep, in the order in which they are done, and what they need."""

    definition: Definition
    jobs: tuple[Job, ...]
    contents: Mapping[str, Content]


Check = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, str]]
"""Has parts of jobs loaded without running them; the digests of the modules that policies are from.
Raises UsageError."""
_CHECKED_AT_ONCE = 100


def plan(definition: Definition, contents: dict[str, Content], check: Check) -> Plan:
    """`contents` gets what a job needs before it is checked.

    Raises UsageError for what is missing, unreadable, or doesn't load; nothing has run then.
    """
    return _Planner(definition, contents, check).plan()


class _Planner:
    def __init__(self, definition: Definition, contents: dict[str, Content], check: Check) -> None:
        self._definition = definition
        self._check = check
        self._contents = contents
        self._by_path: dict[tuple[str, ...], Content] = {}

    def plan(self) -> Plan:
        definition = self._definition
        policies = {each.label: self._policies(each) for each in definition.policies}
        workloads: dict[tuple[str, int], dict[str, Any]] = {}
        for cell in definition.cells():
            at = (cell.workload.label, cell.repetition)
            if at not in workloads:
                workloads[at] = self._workload(cell.workload, cell)
        modules = self._checked([{"policies": each} for each in policies.values()])
        modules |= self._checked(list(workloads.values()))
        jobs = []
        for cell in definition.cells():
            words = {
                **workloads[cell.workload.label, cell.repetition],
                "policies": policies[cell.policy.label],
                "seed": definition.seed + cell.repetition,
                "repetition": cell.repetition,
                "seconds": definition.seconds,
            }
            specs = sorted(each["spec"] for each in words["policies"])
            words["modules"] = {spec: modules[spec] for spec in specs if spec in modules}
            jobs.append(Job(_key(words), cell, words))
        return Plan(definition, tuple(jobs), self._contents)

    def _checked(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Have parts of jobs, policies or workloads, checked, each once; their modules."""
        different = list({_canonical(part): part for part in parts}.values())
        found: dict[str, str] = {}
        for start in range(0, len(different), _CHECKED_AT_ONCE):
            found |= self._check(different[start : start + _CHECKED_AT_ONCE])
        return found

    # -- policies -----------------------------------------------------------------------------

    def _policies(self, chosen: PolicyChoice) -> list[dict[str, Any]]:
        return [
            {
                "spec": self._source(spec, dict(chosen.files), f"--policy {spec}"),
                "words": [self._word(word) for word in words],
            }
            for spec, words in chosen.stack
        ]

    def _source(self, spec: str, files: Mapping[str, str], called: str) -> str:
        """A spec as a job has it: FILE.py becomes the content that has it."""
        path, _, name = spec.rpartition(":")
        if not path.endswith(".py"):
            if files:
                raise UsageError(f"{called}: files go beside a FILE.py; this one names a module")
            return spec
        for each in files:
            if os.path.basename(each) != each or each in (".", ".."):
                raise UsageError(f"{called}: files: {each!r} is no file name")
        more = {each: self._definition.path(path) for each, path in files.items()}
        found = self._content(
            ("policy", path, *more.values()),
            lambda: content.of_policy(self._definition.path(path), path, more),
            called,
        )
        return f"{place(found.digest, os.path.basename(path))}:{name}"

    def _word(self, word: str) -> str:
        """NAME=VALUE, where the value may be a policy in a file of its own."""
        name, equals, value = word.partition("=")
        path = value.rpartition(":")[0]
        if path.endswith(".py") and os.path.isfile(self._definition.path(path)):
            return f"{name}{equals}{self._source(value, {}, f'--policy-arg {word}')}"
        return word

    # -- workloads ----------------------------------------------------------------------------

    def _workload(self, workload: Workload, cell: Cell) -> dict[str, Any]:
        about = cell.words(workload.about)
        called = f"workload {workload.label}"
        files = {
            name: place(self._file(path, called).digest, os.path.basename(path))
            for name, path in cell.words(workload.files)
        }
        about = filled(about, files)
        if workload.kind == "replay":
            about["trace"] = self._trace(about["trace"], called)
        elif workload.kind == "scenario":
            about["parameters"] = dict(workload.parameters)
            about["scenario"] = self._source(about["scenario"], {}, called)
            if about["model"] and os.path.isdir(self._definition.path(about["model"])):
                about["model"] = self._trace(about["model"], called)
        elif workload.kind == "kvm":
            for key in ("kernel", "initrd"):
                if about.get(key) and not content.needed(about[key]):
                    found = self._file(about[key], called)
                    about[key] = place(found.digest, os.path.basename(about[key]))
            about["disks"] = [self._disk(disk, called) for disk in about.get("disks", [])]
        return {"kind": workload.kind, "about": about}

    def _disk(self, disk: str, called: str) -> str:
        if content.needed(disk):
            return disk
        path, comma, options = disk.partition(",")
        return f"{place(self._file(path, called).digest, os.path.basename(path))}{comma}{options}"

    def _trace(self, path: str, called: str) -> str:
        full = self._definition.path(path)
        if not os.path.isdir(full):
            what = "is not a folder" if os.path.exists(full) else "no such folder"
            raise UsageError(f"{called}: {path}: {what}; give the DIR of a run with --trace DIR")
        made = self._content(("trace", path), lambda: content.of_folder(full, path), called)
        return place(made.digest, "")

    def _file(self, path: str, called: str) -> Content:
        full = self._definition.path(path)
        return self._content(("file", path), lambda: content.of_file(full, path), called)

    def _content(self, at: tuple[str, ...], make: Callable[[], Content], called: str) -> Content:
        if at not in self._by_path:
            try:
                found = make()
            except UsageError as error:
                raise UsageError(f"{called}: {error}") from None
            self._by_path[at] = found
            self._contents.setdefault(found.digest, found)
        return self._by_path[at]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _key(words: Mapping[str, Any]) -> str:
    """Without what doesn't decide the result: how long it may take."""
    decisive = {name: value for name, value in words.items() if name != "seconds"}
    text = _canonical([FORMAT, pyvmm_version(), figures_digest(), decisive])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def facts(job: Job) -> dict[str, Any]:
    """A cell in words, for people who look into the store."""
    cell = job.cell
    return {
        "policy": cell.policy.name,
        "parameters": dict(cell.policy.parameters),
        "workload": cell.workload.name,
        "kernel": cell.workload.kernel,
        "workload_parameters": dict(cell.workload.parameters),
        "repetition": cell.repetition,
        "seed": job.words["seed"],
        "kind": cell.workload.kind,
    }


def text_of(definition: Definition) -> str:
    """The expanded definition as JSON, without where its files are."""
    return json.dumps(
        {
            "name": definition.name,
            "seed": definition.seed,
            "repetitions": definition.repetitions,
            "time_limit": definition.seconds,
            "policies": [_as_dict(each) for each in definition.policies],
            "workloads": [_as_dict(each) for each in definition.workloads],
        }
    )


def _as_dict(record: PolicyChoice | Workload) -> dict[str, Any]:
    return record._asdict()
