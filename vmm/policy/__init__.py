"""Policies: user code that decides about conversions. Mechanism never decides.

Everything that a policy needs is imported from here: `from vmm.policy import Policy, Allow, Deny`.
"""

from vmm.memory.guest_memory import PageState
from vmm.policy.protocol import Allow, Decision, Deny, Event, Policy, PolicyError, View

__all__ = ["Allow", "Decision", "Deny", "Event", "PageState", "Policy", "PolicyError", "View"]
