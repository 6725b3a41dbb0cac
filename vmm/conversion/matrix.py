"""Which scheme takes which backing for which guest: words alone, so that options can be checked
before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence

SCHEMES = ("pkvm", "attributes", "in-place", "realm", "cbit", "remap")
"""Strongest first: under `pkvm` the hypervisor keeps the state of each page, in the next two KVM
itself. `realm`, `cbit` and `remap` isolate alike; a conversion under `remap` costs the guest all
its mappings, and parks its vCPUs. An architecture has some of them (Architecture.schemes)."""

_ALIASES_AND_MEMSLOTS = ("realm", "cbit", "remap")

BACKINGS = {
    "memfd-protected": ("pkvm",),
    "guest_memfd-plain": ("attributes",),
    "guest_memfd-in-place": ("in-place",),
    "guest_memfd": _ALIASES_AND_MEMSLOTS,
    "guest_memfd-mmap": _ALIASES_AND_MEMSLOTS,
    "memfd": _ALIASES_AND_MEMSLOTS,
    "memfd-sealed": _ALIASES_AND_MEMSLOTS,
    "memfd-hugetlb": _ALIASES_AND_MEMSLOTS,
}
"""The private side's backings, strongest first, each with the schemes that take it."""

LOADABLE = ("memfd-protected", "guest_memfd-mmap", "memfd", "memfd-sealed", "memfd-hugetlb")
"""Backings into which the host can put private pages before the guest runs."""

ONLY_WHEN_NAMED = ("memfd-sealed", "memfd-hugetlb")
"""Backings that "auto" never picks: no stronger than memfd, and not there everywhere."""

TWO_ADDRESSES = ("realm", "cbit")
"""Schemes with an address bit by which the guest picks the side."""

FOR_LINUX = ("pkvm", *TWO_ADDRESSES)
"""Schemes that Linux knows: it picks the side by an address bit, or asks pKVM."""

UNTOLD = ("pkvm",)
"""Schemes of guests that convert their pages without telling the host."""

NEEDS = {
    "pkvm": "needs arm64 Linux started with kvm-arm.mode=protected, as pyvmm lab --host pkvm is",
    "realm": "needs a KVM that passes a guest's SMC calls on (KVM_ARM_VM_SMCCC_FILTER, Linux 6.4)",
    "attributes": "needs a kernel with CONFIG_KVM_SW_PROTECTED_VM, as pyvmm lab --host "
    "sw-protected has",
    "in-place": "needs a kernel with KVM_SET_MEMORY_ATTRIBUTES2, as pyvmm lab --host "
    "experimental has",
    "guest_memfd": "Linux 6.18 or later has it",
    "guest_memfd-mmap": "Linux 6.18 or later has it",
}
"""What is missing where KVM refuses a scheme or a backing."""

TO_SHARE = {
    "pkvm": "a protected guest's kernel needs CONFIG_ARM_PKVM_GUEST and CONFIG_DMA_RESTRICTED_POOL "
    "to share what its devices use, which Debian's don't have; pyvmm lab's --kernel pkvm-guest has",
}
"""What a guest needs to share by itself, under schemes whose host is not told when it doesn't."""


def backings_of(schemes: Sequence[str]) -> list[str]:
    """The backings that one of the schemes takes, strongest first."""
    return [name for name, takers in BACKINGS.items() if set(takers) & set(schemes)]


def backings_for(scheme: str, *, host_loads: bool) -> list[str]:
    """The backings that go with a scheme, strongest first; `host_loads`: see LOADABLE."""
    return [
        name
        for name, schemes in BACKINGS.items()
        if scheme in schemes and (name in LOADABLE or not host_loads)
    ]
