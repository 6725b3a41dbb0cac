"""The machines that the lab can be: which KVM their Linux has, and what emulates them."""

from __future__ import annotations

from dataclasses import dataclass

from vmm.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Host:
    """One kind of lab machine, as `--host` names it."""

    name: str
    summary: str
    sw_protected: bool = False  # its KVM is compiled anew, with KVM_X86_SW_PROTECTED_VM


STOCK = Host("stock", "Debian's kernel as it is, under QEMU (the default)")
SW_PROTECTED = Host(
    "sw-protected",
    "the same, KVM compiled with KVM_X86_SW_PROTECTED_VM (once, a minute)",
    sw_protected=True,
)
HOSTS = {host.name: host for host in (STOCK, SW_PROTECTED)}


def named(name: str) -> Host:
    """The host of that name; UsageError lists what there is."""
    host = HOSTS.get(name)
    if host is None:
        raise UsageError(f"--host {name}: no such host of the lab; there are {', '.join(HOSTS)}")
    return host
