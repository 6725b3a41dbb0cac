"""LeastPrivilege: a device touches what its driver named to it, and nothing else."""

from __future__ import annotations

from vmm.policy import Allow, Decision, Deny, IoEvent, Policy, View


class LeastPrivilege(Policy):
    """Stops a device that touches shared memory which no ring and no descriptor names.

    All that is shared could be touched by any device otherwise. A buffer counts while its
    request is being carried out, and in the direction that its descriptor gives.
    """

    def on_io(self, event: IoEvent, view: View) -> Decision:
        return Allow() if event.named else Deny()
