"""Policies: user code that decides about conversions. Mechanism never decides.

Everything that a policy needs: `from vmm.policy import Policy, Allow, Deny`.
"""

from vmm.policy.protocol import Allow, Decision, Deny, Event, Policy, PolicyError, View

__all__ = ["Allow", "Decision", "Deny", "Event", "Policy", "PolicyError", "View"]
