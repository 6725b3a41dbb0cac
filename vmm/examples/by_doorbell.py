"""Which conversions come by which door? Close the doors that a guest should not need.

A fault means that the guest touched a page as if it were in the other state, without asking.
--policy vmm.examples.by_doorbell:ByDoorbell --policy-arg doors=hypercall,port
"""

from __future__ import annotations

import sys

from vmm.policy import Allow, Decision, Deny, End, Event, Policy, View


class ByDoorbell(Policy):
    """Allows what comes by one of `doors` (hypercall, port, fault); says at the end what came."""

    def __init__(self, doors: str = "hypercall,port") -> None:
        self._doors = set(doors.split(","))
        if unknown := self._doors - {"hypercall", "port", "fault"}:
            raise ValueError(f"doors={doors}: there is no {', '.join(sorted(unknown))}")
        self.counts: dict[str, int] = {}

    def on_share(self, event: Event, view: View) -> Decision:
        self.counts[event.doorbell] = self.counts.get(event.doorbell, 0) + 1
        return Allow() if event.doorbell in self._doors else Deny()

    def on_unshare(self, event: Event, view: View) -> Decision:
        return self.on_share(event, view)

    def on_exit(self, end: End, view: View) -> None:
        for door, count in sorted(self.counts.items()):
            print(f"{count} requests by {door}", file=sys.stderr)
