"""`pyvmm check`: what this host can do, probed, what each thing is good for, and which jobs run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvm_bindings import KvmError, System
from vmm.core.errors import HostError
from vmm.host.capability import (
    JOBS,
    KERNEL_PRIVATE,
    MAIN_JOB,
    PRIVATE,
    PRIVATE_CODE,
    Capability,
)
from vmm.host.choice import Wanted, choose
from vmm.host.kvm import open_kvm
from vmm.host.probes.finding import Finding, broken, no, unknown
from vmm.memory.lending import can_lend

if TYPE_CHECKING:
    from vmm.host.architecture import HostArchitecture

FORMAT = 1
"""Version of the JSON; its keys stay, new ones may come."""


@dataclass(frozen=True, slots=True)
class Row:
    """A capability with what was found."""

    capability: Capability
    finding: Finding

    @property
    def works(self) -> bool:
        return self.finding.status == "yes"

    @property
    def advice(self) -> str:
        """What to do, where there is something to do."""
        return self.capability.if_missing if self.finding.status in ("no", "broken") else ""


class Choice(NamedTuple):
    """What "auto" comes to: the scheme, the private backing and what a host access to it meets,
    the stronger schemes with the reason why each does not serve, and whether devices behind a
    virtual IOMMU can be lent private pages."""

    scheme: str
    backing: str
    host_access: str
    not_taken: dict[str, str]
    lends: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One use of pyvmm: whether it can run, the keys of what is missing, and with private memory
    what it would run with."""

    title: str
    missing: tuple[str, ...]
    choice: Choice | None = None

    @property
    def can_run(self) -> bool:
        return not self.missing


@dataclass(frozen=True, slots=True)
class HostCheck:
    """The whole answer. `error`: why KVM could not be opened, in the words of every command."""

    rows: tuple[Row, ...]
    jobs: Mapping[str, Job]
    error: str | None
    lab: str = "pyvmm lab"
    """HostArchitecture.lab."""

    @property
    def exit_status(self) -> int:
        """0 when the main job can run, else 3."""
        return 0 if self.jobs[MAIN_JOB].can_run else HostError.exit_status

    def as_json(self) -> dict[str, object]:
        """Plain data for --json."""
        return {
            "format": FORMAT,
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "exit_status": self.exit_status,
            "error": self.error,
            "jobs": {
                name: {
                    "title": job.title,
                    "can_run": job.can_run,
                    "missing": list(job.missing),
                    "backing": job.choice and job.choice.backing,
                    "host_access": job.choice and job.choice.host_access,
                    "scheme": job.choice and job.choice.scheme,
                    "lends": job.choice.lends if job.choice else None,
                    "schemes_not_taken": job.choice.not_taken if job.choice else {},
                }
                for name, job in self.jobs.items()
            },
            "capabilities": [
                {
                    "key": row.capability.key,
                    "capability": row.capability.title,
                    "status": row.finding.status,
                    "result": row.finding.result,
                    "evidence": row.finding.evidence,
                    "enables": row.capability.enables,
                    "if_missing": row.capability.if_missing,
                    "needed_by": list(row.capability.needed_by),
                    "alternatives": list(row.capability.alternatives),
                    "data": row.finding.data,
                }
                for row in self.rows
            ],
        }


def check_host(architecture: HostArchitecture) -> HostCheck:
    """Probe everything; some seconds at most. Never raises for what the host lacks."""
    capabilities = architecture.capabilities()
    try:
        system = open_kvm(architecture, complete=False)
    except HostError as error:
        return _closed(capabilities, str(error), architecture.lab)
    with system:
        rows = tuple(Row(each, probed(each.probe, system)) for each in capabilities)
        strict = any(row.works for row in rows if row.capability.key == PRIVATE_CODE)
        choices = {
            job: probed_choice(architecture, system, kernel=job == KERNEL_PRIVATE, strict=strict)
            for job in PRIVATE
        }
    return HostCheck(rows, judge(rows, choices), None, architecture.lab)


def _closed(capabilities: Sequence[Capability], reason: str, lab: str) -> HostCheck:
    findings = [unknown("KVM could not be opened") for _ in capabilities]
    findings[0] = no("cannot be used", reason)
    rows = tuple(map(Row, capabilities, findings))
    return HostCheck(rows, judge(rows, {}), reason, lab)


def probed(probe: Callable[[Any], Finding], system: System) -> Finding:
    """The probe's finding; what it raises about the host is one too."""
    try:
        return probe(system)
    except HostError as error:
        return no("not possible", str(error))
    except OSError as error:  # KvmError is one
        return broken("fails", str(error))


def probed_choice(
    architecture: HostArchitecture, system: System, *, kernel: bool, strict: bool = False
) -> Choice | None:
    """What --private-mem=auto --scheme auto gives; None when nothing serves. `strict`: kernels
    load themselves here."""
    host_loads = kernel and not strict
    wanted = Wanted("auto", "auto", 2 << 20, two_addresses=kernel, host_loads=host_loads)
    try:
        chosen = choose(architecture, system, wanted)
    except (KvmError, HostError):
        return None
    choice = Choice(
        chosen.scheme,
        chosen.backing.name,
        chosen.backing.host_access,
        chosen.not_taken,
        can_lend(chosen.backing),
    )
    chosen.backing.close()
    chosen.vm.close()
    return choice


def judge(rows: tuple[Row, ...], choices: Mapping[str, Choice | None]) -> dict[str, Job]:
    """Which jobs can run, by what works and which job needs it."""
    working = {row.capability.key for row in rows if row.works}
    jobs = {}
    for name, title in JOBS.items():
        missing = tuple(
            row.capability.key
            for row in rows
            if name in row.capability.needed_by
            and working.isdisjoint((row.capability.key, *row.capability.alternatives))
        )
        jobs[name] = Job(title, missing, None if missing else choices.get(name))
    return jobs
