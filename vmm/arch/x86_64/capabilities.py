"""What `pyvmm check` looks for on x86."""

from __future__ import annotations

from functools import partial

from vmm.arch.x86_64.probes import cpu, events, strict
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.host.capability import (
    KERNEL_PRIVATE,
    KERNELS,
    MEMFD_SERVES,
    PAYLOAD_PRIVATE,
    PRIVATE,
    PRIVATE_CODE,
    Capability,
    file_io,
    guest_memfd,
    kvm,
    memfds,
    memslots,
    use_lab,
)
from vmm.host.probes import attributes, memory

if TYPE_CHECKING:
    from vmm.host.architecture import HostArchitecture

_INERT = "needs a VM type with memory attributes; --scheme cbit needs none"
_ATTRIBUTES = "private memory by attributes, in one address space"


def capabilities(x86: HostArchitecture) -> tuple[Capability, ...]:
    """See HostArchitecture.capabilities."""
    lab = use_lab(x86)
    return (
        kvm(x86),
        Capability(
            "kernel_mode", "kernel-mode code", cpu.kernel_mode,
            "Linux: it uses instructions that an interpreter lacks",
            f"only small guests and the embedded payload (user mode) run; {lab}", KERNELS,
        ),
        Capability(
            "user_mode", "user-mode code", cpu.user_mode, "the embedded payload", lab,
            (PAYLOAD_PRIVATE,),
        ),
        Capability(
            "hypercall_exits", "hypercalls", cpu.hypercall_exits,
            "Linux: its share and unshare requests",
            f"the embedded payload asks through a port instead; {lab}", (KERNEL_PRIVATE,),
        ),
        Capability(
            "user_space_msrs", "unknown MSRs", cpu.user_space_msrs,
            "Linux: reads there that it is encrypted", f"Linux 5.10 or later has it; {lab}",
            (KERNEL_PRIVATE,),
        ),
        Capability(
            "share_announcement", "CPUID announcement", cpu.share_announcement,
            "Linux: learns there that it may share", lab, (KERNEL_PRIVATE,),
        ),
        Capability(
            PRIVATE_CODE, "code KVM can't read", strict.private_code,
            "--private-mem=guest_memfd for Linux, which loads itself: kernel-enforced",
            "Linux' private memory is a rehearsal; processors that say next RIP and CR operands "
            "(AMD: decode assists) have it, and pyvmm lab --host bochs",
        ),
        Capability(
            "c_bit", "C-bit", cpu.c_bit, "--scheme cbit: the guest picks private or shared", lab,
            PRIVATE,
        ),
        guest_memfd(x86, 0, _ATTRIBUTES, _INERT),
        guest_memfd(x86, 1, "--private-mem=guest_memfd: the kernel keeps the host out, "
                    "so that no page can be lent (--iommu)", MEMFD_SERVES),
        guest_memfd(x86, 2, _ATTRIBUTES, _INERT),
        guest_memfd(x86, 3, "--private-mem=guest_memfd-mmap: the host can load a kernel, "
                    "and pages can be lent to devices (--iommu)", MEMFD_SERVES),
        *memfds(x86),
        *file_io(x86),
        Capability(
            "vm_types", "VM types", partial(memory.vm_types, x86),
            "VMs that have memory attributes",
            "needs a kernel with CONFIG_KVM_SW_PROTECTED_VM, or TDX or SNP; --scheme cbit needs "
            "none",
        ),
        Capability(
            "memory_attributes", "memory attributes", partial(attributes.memory_attributes, x86),
            _ATTRIBUTES, "needs CONFIG_KVM_SW_PROTECTED_VM; --scheme cbit needs none",
        ),
        Capability(
            "in_place", "in-place conversion", partial(attributes.in_place, x86),
            "--scheme in-place: pages keep their place in one guest_memfd",
            "no kernel has it yet, pyvmm lab --host experimental does; --scheme attributes or cbit",
        ),
        Capability(
            "memory_faults", "memory-fault exits", partial(attributes.memory_faults, x86),
            "implicit conversions", "Linux 6.8 or later has it; --scheme cbit needs none",
        ),
        Capability(
            "pre_fault", "mapping ahead", cpu.pre_fault, "a faster start",
            "Linux 6.11 or later with nested paging has it; guests fault page by page",
        ),
        memslots(x86),
        Capability(
            "ioeventfd", "ioeventfd", events.ioeventfd,
            "disks: notifications without an exit", lab,
        ),
        Capability(
            "irqfd_resample", "irqfd with resample", events.irqfd_resample,
            "disks: level interrupts", lab,
        ),
        Capability(
            "coalesced_ports", "coalesced port writes", events.coalesced_ports,
            "fewer exits for index registers", "nothing: each write exits",
        ),
        Capability(
            "exit_latency", "exit to user space", cpu.exit_latency,
            "every device access costs it", lab,
        ),
    )  # fmt: skip
