"""Policies to run, and to read as examples: `--policy vmm.policy.builtin:Quota`.

One file each, named like the class.
"""

from vmm.policy.builtin.allow_all import AllowAll
from vmm.policy.builtin.audit import Audit
from vmm.policy.builtin.coalesce import Coalesce
from vmm.policy.builtin.deferred_discard import DeferredDiscard
from vmm.policy.builtin.deny_after_boot import DenyAfterBoot
from vmm.policy.builtin.hysteresis import Hysteresis
from vmm.policy.builtin.keep_shared import KeepShared
from vmm.policy.builtin.least_privilege import LeastPrivilege
from vmm.policy.builtin.page_budget import PageBudget
from vmm.policy.builtin.quota import Quota
from vmm.policy.builtin.rate_limit import RateLimit

__all__ = [
    "AllowAll",
    "Audit",
    "Coalesce",
    "DeferredDiscard",
    "DenyAfterBoot",
    "Hysteresis",
    "KeepShared",
    "LeastPrivilege",
    "PageBudget",
    "Quota",
    "RateLimit",
]
