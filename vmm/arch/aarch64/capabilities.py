"""What `pyvmm check` looks for on arm64."""

from __future__ import annotations

from functools import partial

from vmm.arch.aarch64.probes import cpu, events, protected
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.host.capability import (
    ALL,
    KERNEL_PRIVATE,
    MEMFD_SERVES,
    Capability,
    file_io,
    guest_memfd,
    kvm,
    memfds,
    memslots,
    use_lab,
)
from vmm.host.probes import memory

if TYPE_CHECKING:
    from vmm.host.architecture import HostArchitecture

_INERT = "nothing: no VM type of arm64 has memory attributes"


def capabilities(arm64: HostArchitecture) -> tuple[Capability, ...]:
    """See HostArchitecture.capabilities."""
    lab = use_lab(arm64)
    return (
        kvm(arm64),
        Capability(
            "guests", "guest code", cpu.guests, "every guest", lab, ALL,
        ),
        Capability(
            "protected_vms", "protected VMs", protected.protected_vms,
            "--scheme pkvm: the hypervisor keeps the host's processors out",
            "start Linux at EL2 with kvm-arm.mode=protected, or use pyvmm lab --host pkvm; "
            "--scheme realm rehearses it", (KERNEL_PRIVATE,), ("forwarded_calls",),
        ),
        Capability(
            "forwarded_calls", "calls to user space", cpu.forwarded_calls,
            "--scheme realm: a stock kernel's share and unshare requests",
            f"Linux 6.4 or later has it; {lab}", (KERNEL_PRIVATE,), ("protected_vms",),
        ),
        Capability(
            "told_shares", "news of shares", protected.told_shares,
            "policies that decide about a protected guest's shares",
            "no kernel tells of shares yet; --scheme realm has such policies asked",
        ),
        guest_memfd(arm64, 0, "private memory by attributes", _INERT),
        guest_memfd(arm64, 1, "--private-mem=guest_memfd: the kernel keeps the host out (the "
                    "embedded payload under realm, remap)", MEMFD_SERVES),
        guest_memfd(arm64, 2, "private memory by attributes", _INERT),
        guest_memfd(arm64, 3, "--private-mem=guest_memfd-mmap: the host can load a kernel (realm)",
                    MEMFD_SERVES),
        *memfds(arm64),
        *file_io(arm64),
        Capability(
            "vm_types", "VM types", partial(memory.vm_types, arm64),
            "protected VMs", "see the line of protected VMs",
        ),
        memslots(arm64),
        Capability("gic_v3", "GICv3", events.gic, "interrupts of every guest", lab, ALL),
        Capability(
            "ioeventfd", "ioeventfd", events.ioeventfd,
            "disks: notifications without an exit", lab,
        ),
        Capability(
            "irqfd_resample", "irqfd with resample", events.irqfd_resample,
            "disks: level interrupts", lab,
        ),
        Capability(
            "exit_latency", "exit to user space", cpu.exit_latency,
            "every device access costs it", lab,
        ),
    )  # fmt: skip
