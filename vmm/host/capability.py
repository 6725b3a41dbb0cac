"""A line of `pyvmm check`: what is probed, what it is good for, and which jobs need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kvm_bindings import System
from vmm.host.kvm import missing_basics
from vmm.host.probes import file_io as probes
from vmm.host.probes import files, memory
from vmm.host.probes.finding import Finding, no, yes

if TYPE_CHECKING:
    from vmm.host.architecture import HostArchitecture

KERNEL_PRIVATE, PAYLOAD_PRIVATE, KERNEL = "kernel_private", "payload_private", "kernel"
JOBS = {
    KERNEL_PRIVATE: "a stock kernel with --private-mem",
    PAYLOAD_PRIVATE: "the embedded payload with --private-mem",
    KERNEL: "a stock kernel without --private-mem",
}
PRIVATE_CODE = "private_code"
"""The line whose capability makes a kernel's private memory kernel-enforced."""
MAIN_JOB = KERNEL_PRIVATE
ALL = tuple(JOBS)
PRIVATE = (KERNEL_PRIVATE, PAYLOAD_PRIVATE)
_EXPERIMENTAL = "no kernel has it yet; pyvmm lab --host experimental does"
KERNELS = (KERNEL_PRIVATE, KERNEL)
MEMFD_SERVES = "Linux 6.18 or later has it; --private-mem=memfd serves everywhere"


@dataclass(frozen=True, slots=True)
class Capability:
    """One line of the table but for the finding.

    `needed_by` names jobs, `alternatives` the keys of lines of which any serves them as well.
    """

    key: str
    title: str
    probe: Callable[[Any], Finding]
    """Called with the architecture's System, open."""
    enables: str
    if_missing: str
    needed_by: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()


def use_lab(architecture: HostArchitecture) -> str:
    """What to do without, where an emulated machine has it."""
    return f"use {architecture.lab}, which emulates a machine that has it"


# -- lines that every architecture has ------------------------------------------------------------


def kvm(architecture: HostArchitecture) -> Capability:
    """KVM itself."""

    def probe(system: System) -> Finding:
        missing = missing_basics(system, architecture)
        version = system.api_version()
        if missing:
            return no(f"lacks {', '.join(missing)}", f"API {version}, KVM_CHECK_EXTENSION")
        return yes(f"API {version}", "opened; every capability that all runs need is there")

    return Capability("kvm", "KVM", probe, "every run", use_lab(architecture), ALL)


def guest_memfd(
    architecture: HostArchitecture, flags: int, enables: str, if_missing: str
) -> Capability:
    """A guest_memfd that is created with `flags`."""
    key = {0: "", 1: "_mmap", 2: "_init_shared", 3: "_mmap_init_shared"}[flags]
    return Capability(
        f"guest_memfd{key}",
        f"guest_memfd, {memory.FLAG_NAMES[flags]}",
        partial(memory.guest_memfd, architecture, flags),
        enables,
        if_missing,
    )


def memfds(architecture: HostArchitecture) -> tuple[Capability, ...]:
    """The memfds with something special about them."""
    return (
        Capability(
            "memfd_sealed", "memfd, sealed", partial(files.sealed_memfd, architecture),
            "--private-mem=memfd-sealed: nobody can truncate it", "--private-mem=memfd",
        ),
        Capability(
            "memfd_hugetlb", "memfd, huge pages", partial(files.hugetlb_memfd, architecture),
            "--private-mem=memfd-hugetlb: fewer faults",
            "set some aside in /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages; "
            "--private-mem=memfd needs none",
        ),
        Capability(
            "memfd_secret", "memfd_secret", partial(files.secret_memfd, architecture),
            "nothing yet: KVM would have to map it", "nothing: no backing is made of it",
        ),
    )  # fmt: skip


def file_io(architecture: HostArchitecture) -> tuple[Capability, ...]:
    """Guest memory by read, write and splice."""
    return (
        Capability(
            "guest_memfd_io", "guest_memfd, read and write",
            partial(probes.guest_memfd_io, architecture),
            "guest memory without a mapping that the host touches", _EXPERIMENTAL,
        ),
        Capability(
            "vm_io", "VM fd, read and write", partial(probes.vm_io, architecture),
            "--disk FILE,io=vmfd: KVM itself says which pages the host may touch", _EXPERIMENTAL,
        ),
    )  # fmt: skip


def memslots(architecture: HostArchitecture) -> Capability:
    """How many ranges of memory a VM takes."""
    return Capability(
        "memslots",
        "memslots",
        memory.memslots,
        "the number of ranges of memory",
        use_lab(architecture),
    )
