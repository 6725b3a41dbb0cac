"""Which of a policy's hooks are asked under which scheme; one that never would be is refused."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.core.errors import UsageError
from vmm.core.lean_typing import Protocol
from vmm.policy.protocol import Policy

ALWAYS = ("on_boot", "on_io", "on_exit")
"""Hooks about what pyvmm itself does."""
OF_REQUESTS = ("on_share", "on_unshare")
"""Hooks that are asked where the host is told of a conversion before it happens."""
OF_FAULTS = ("on_fault",)
"""Where an access to a page in the other state asks for a conversion."""

OF_LENDING = ("on_lend", "on_return")
"""Asked where the guest has a virtual IOMMU, and private pages that the host can reach."""

OF_SNAPSHOTS = ("on_save", "on_restore")
"""Asked where the machine can be saved: x86-64 alone."""

HOOKS: dict[str, tuple[str, ...]] = {
    "pkvm": ALWAYS,
    "attributes": (*ALWAYS, *OF_REQUESTS, *OF_FAULTS, *OF_SNAPSHOTS),
    "in-place": (*ALWAYS, *OF_REQUESTS, *OF_FAULTS, *OF_SNAPSHOTS),
    "realm": (*ALWAYS, *OF_REQUESTS),
    "cbit": (*ALWAYS, *OF_REQUESTS, *OF_LENDING, *OF_SNAPSHOTS),
    "remap": (*ALWAYS, *OF_REQUESTS, *OF_LENDING, *OF_SNAPSHOTS),
}
"""The hooks that work under each scheme: the table of vmm/docs/reference/policies.md."""


class NamedScheme(Protocol):
    """What has to be known of a scheme."""

    name: str
    told: bool


def require_asked(
    policies: Sequence[Policy], scheme: NamedScheme, instead: Sequence[str] = ()
) -> None:
    """Raise UsageError for a policy with a hook that the host is never told enough to call.

    A policy that decides about shares must not believe that it does. `instead` are the schemes of
    this architecture. on_fault alone is no such hook where nothing converts on a fault: there its
    requests come as shares and unshares, which are asked about.
    """
    if scheme.told:
        return
    unasked = (*OF_REQUESTS, *OF_FAULTS)
    for policy in policies:
        hooks = [hook for hook in unasked if policy.wants(hook)]
        if hooks:
            telling = [name for name in instead if name != scheme.name]
            remedy = f"use --scheme {' or '.join(telling)}, or " if telling else ""
            raise UsageError(
                f"policy {type(policy).__name__}: {', '.join(hooks)} can't be asked under scheme "
                f"{scheme.name}, whose guest converts pages without telling the host; {remedy}a "
                f"policy of {', '.join(ALWAYS[:-1])} and {ALWAYS[-1]} alone"
            )
