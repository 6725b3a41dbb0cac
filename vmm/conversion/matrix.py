"""Which scheme takes which backing for which guest: words alone, so that options can be checked
before anything is opened."""

from __future__ import annotations

SCHEMES = ("attributes", "in-place", "cbit", "remap")
"""Strongest first: in the first two KVM itself keeps the state of each page. `cbit` and `remap`
isolate alike; a conversion under `remap` costs the guest all its mappings, and parks its vCPUs."""

_ALIASES_AND_MEMSLOTS = ("cbit", "remap")

BACKINGS = {
    "guest_memfd-plain": ("attributes",),
    "guest_memfd-in-place": ("in-place",),
    "guest_memfd": _ALIASES_AND_MEMSLOTS,
    "guest_memfd-mmap": _ALIASES_AND_MEMSLOTS,
    "memfd": _ALIASES_AND_MEMSLOTS,
    "memfd-sealed": _ALIASES_AND_MEMSLOTS,
    "memfd-hugetlb": _ALIASES_AND_MEMSLOTS,
}
"""The private side's backings, strongest first, each with the schemes that take it."""

LOADABLE = ("guest_memfd-mmap", "memfd", "memfd-sealed", "memfd-hugetlb")
"""Backings into which the host can put private pages before the guest runs."""

ONLY_WHEN_NAMED = ("memfd-sealed", "memfd-hugetlb")
"""Backings that "auto" never picks: no stronger than memfd, and not there everywhere."""

TWO_ADDRESSES = ("cbit",)
"""Schemes for guests that pick the side by an address bit, as Linux does."""

NEEDS = {
    "attributes": "needs a kernel with CONFIG_KVM_SW_PROTECTED_VM, as pyvmm lab --host "
    "sw-protected has",
    "in-place": "needs a kernel with KVM_SET_MEMORY_ATTRIBUTES2, which none has yet",
    "guest_memfd": "Linux 6.18 or later has it",
    "guest_memfd-mmap": "Linux 6.18 or later has it",
}
"""What is missing where KVM refuses a scheme or a backing."""


def backings_for(scheme: str, *, host_loads: bool) -> list[str]:
    """The backings that go with a scheme, strongest first; `host_loads`: see LOADABLE."""
    return [
        name
        for name, schemes in BACKINGS.items()
        if scheme in schemes and (name in LOADABLE or not host_loads)
    ]
