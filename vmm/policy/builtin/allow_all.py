"""AllowAll: what a hook costs that says yes to everything."""

from __future__ import annotations

from vmm.policy import Allow, Decision, Event, Policy, View


class AllowAll(Policy):
    """Allows every conversion, and is asked about each (a run without a policy asks nobody)."""

    def on_share(self, event: Event, view: View) -> Decision:
        return Allow()

    def on_unshare(self, event: Event, view: View) -> Decision:
        return Allow()
