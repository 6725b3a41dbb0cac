"""`pyvmm check`: what this host can do, probed, what each thing is good for, and which jobs run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from kvm_bindings import KvmError
from kvm_bindings.x86_64 import System
from vmm.core.errors import HostError
from vmm.machine.host import missing_basics, open_kvm
from vmm.machine.probes import attributes, cpu, events, files, memory
from vmm.machine.probes.finding import Finding, broken, no, unknown, yes
from vmm.machine.schemes import Wanted, choose

FORMAT = 1
"""Version of the JSON; its keys stay, new ones may come."""

LAB = "use pyvmm lab, which emulates a machine that has it"

KERNEL_PRIVATE, PAYLOAD_PRIVATE, KERNEL = "kernel_private", "payload_private", "kernel"
JOBS = {
    KERNEL_PRIVATE: "a stock kernel with --private-mem",
    PAYLOAD_PRIVATE: "the embedded payload with --private-mem",
    KERNEL: "a stock kernel without --private-mem",
}
MAIN_JOB = KERNEL_PRIVATE
_ALL = tuple(JOBS)
_PRIVATE = (KERNEL_PRIVATE, PAYLOAD_PRIVATE)
_KERNELS = (KERNEL_PRIVATE, KERNEL)


@dataclass(frozen=True, slots=True)
class Capability:
    """One line of the table but for the finding; `needed_by` names jobs."""

    key: str
    title: str
    probe: Callable[[System], Finding]
    enables: str
    if_missing: str
    needed_by: tuple[str, ...] = ()


def _kvm(system: System) -> Finding:
    missing = missing_basics(system)
    version = system.api_version()
    if missing:
        return no(f"lacks {', '.join(missing)}", f"API {version}, KVM_CHECK_EXTENSION")
    return yes(f"API {version}", "opened; every capability that all runs need is there")


def _guest_memfd(flags: int, key: str, enables: str, if_missing: str) -> Capability:
    return Capability(
        f"guest_memfd{key}",
        f"guest_memfd, {memory.FLAG_NAMES[flags]}",
        partial(memory.guest_memfd, flags=flags),
        enables,
        if_missing,
    )


_MEMFD_SERVES = "Linux 6.18 or later has it; --private-mem=memfd serves everywhere"
_INERT = "needs a VM type with memory attributes; --scheme cbit needs none"
_ATTRIBUTES = "private memory by attributes, in one address space"

CAPABILITIES = (
    Capability("kvm", "KVM", _kvm, "every run", LAB, _ALL),
    Capability(
        "kernel_mode", "kernel-mode code", cpu.kernel_mode,
        "Linux: it uses instructions that an interpreter lacks",
        f"only small guests and the embedded payload (user mode) run; {LAB}", _KERNELS,
    ),
    Capability(
        "user_mode", "user-mode code", cpu.user_mode, "the embedded payload", LAB,
        (PAYLOAD_PRIVATE,),
    ),
    Capability(
        "hypercall_exits", "hypercalls", cpu.hypercall_exits,
        "Linux: its share and unshare requests",
        f"the embedded payload asks through a port instead; {LAB}", (KERNEL_PRIVATE,),
    ),
    Capability(
        "user_space_msrs", "unknown MSRs", cpu.user_space_msrs,
        "Linux: reads there that it is encrypted", f"Linux 5.10 or later has it; {LAB}",
        (KERNEL_PRIVATE,),
    ),
    Capability(
        "share_announcement", "CPUID announcement", cpu.share_announcement,
        "Linux: learns there that it may share", LAB, (KERNEL_PRIVATE,),
    ),
    Capability(
        "c_bit", "C-bit", cpu.c_bit, "--scheme cbit: the guest picks private or shared", LAB,
        _PRIVATE,
    ),
    _guest_memfd(0, "", _ATTRIBUTES, _INERT),
    _guest_memfd(
        1, "_mmap", "--private-mem=guest_memfd: the kernel keeps the host out", _MEMFD_SERVES
    ),
    _guest_memfd(2, "_init_shared", _ATTRIBUTES, _INERT),
    _guest_memfd(
        3, "_mmap_init_shared", "--private-mem=guest_memfd-mmap: the host can load a kernel",
        _MEMFD_SERVES,
    ),
    Capability(
        "memfd_sealed", "memfd, sealed", files.sealed_memfd,
        "--private-mem=memfd-sealed: nobody can truncate it", "--private-mem=memfd",
    ),
    Capability(
        "memfd_hugetlb", "memfd, huge pages", files.hugetlb_memfd,
        "--private-mem=memfd-hugetlb: fewer faults",
        "set some aside in /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages; "
        "--private-mem=memfd needs none",
    ),
    Capability(
        "memfd_secret", "memfd_secret", files.secret_memfd,
        "nothing yet: KVM would have to map it", "nothing: no backing is made of it",
    ),
    Capability(
        "vm_types", "VM types", memory.vm_types, "VMs that have memory attributes",
        "needs a kernel with CONFIG_KVM_SW_PROTECTED_VM, or TDX or SNP; --scheme cbit needs none",
    ),
    Capability(
        "memory_attributes", "memory attributes", attributes.memory_attributes, _ATTRIBUTES,
        "needs CONFIG_KVM_SW_PROTECTED_VM; --scheme cbit needs none",
    ),
    Capability(
        "in_place", "in-place conversion", attributes.in_place,
        "--scheme in-place: pages keep their place in one guest_memfd",
        "no kernel has it yet; --scheme attributes or cbit",
    ),
    Capability(
        "memory_faults", "memory-fault exits", attributes.memory_faults, "implicit conversions",
        "Linux 6.8 or later has it; --scheme cbit needs none",
    ),
    Capability(
        "pre_fault", "mapping ahead", cpu.pre_fault, "a faster start",
        "Linux 6.11 or later with nested paging has it; guests fault page by page",
    ),
    Capability("memslots", "memslots", memory.memslots, "the number of ranges of memory", LAB),
    Capability(
        "ioeventfd", "ioeventfd", events.ioeventfd, "disks: notifications without an exit", LAB
    ),
    Capability(
        "irqfd_resample", "irqfd with resample", events.irqfd_resample,
        "disks: level interrupts", LAB,
    ),
    Capability(
        "coalesced_ports", "coalesced port writes", events.coalesced_ports,
        "fewer exits for index registers", "nothing: each write exits",
    ),
    Capability(
        "exit_latency", "exit to user space", cpu.exit_latency, "every device access costs it",
        LAB,
    ),
)  # fmt: skip


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
    and the stronger schemes with the reason why each does not serve."""

    scheme: str
    backing: str
    host_access: str
    not_taken: dict[str, str]


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
                    "data": row.finding.data,
                }
                for row in self.rows
            ],
        }


def check_host() -> HostCheck:
    """Probe everything; some seconds at most. Never raises for what the host lacks."""
    try:
        system = open_kvm(complete=False)
    except HostError as error:
        return _closed(str(error))
    with system:
        rows = tuple(Row(each, probed(each.probe, system)) for each in CAPABILITIES)
        choices = {job: probed_choice(system, kernel=job == KERNEL_PRIVATE) for job in _PRIVATE}
    return HostCheck(rows, judge(rows, choices), None)


def _closed(reason: str) -> HostCheck:
    findings = [unknown("KVM could not be opened") for _ in CAPABILITIES]
    findings[0] = no("cannot be used", reason)
    rows = tuple(map(Row, CAPABILITIES, findings))
    return HostCheck(rows, judge(rows, {}), reason)


def probed(probe: Callable[[System], Finding], system: System) -> Finding:
    """The probe's finding; what it raises about the host is one too."""
    try:
        return probe(system)
    except HostError as error:
        return no("not possible", str(error))
    except OSError as error:  # KvmError is one
        return broken("fails", str(error))


def probed_choice(system: System, *, kernel: bool) -> Choice | None:
    """What --private-mem=auto --scheme auto gives; None when nothing serves."""
    wanted = Wanted("auto", "auto", 2 << 20, two_addresses=kernel, host_loads=kernel)
    try:
        chosen = choose(system, wanted)
    except (KvmError, HostError):
        return None
    choice = Choice(
        chosen.scheme, chosen.backing.name, chosen.backing.host_access, chosen.not_taken
    )
    chosen.backing.close()
    chosen.vm.close()
    return choice


def judge(rows: tuple[Row, ...], choices: Mapping[str, Choice | None]) -> dict[str, Job]:
    """Which jobs can run, by what works and who needs it."""
    jobs = {}
    for name, title in JOBS.items():
        missing = tuple(
            row.capability.key for row in rows if name in row.capability.needed_by and not row.works
        )
        jobs[name] = Job(title, missing, None if missing else choices.get(name))
    return jobs
