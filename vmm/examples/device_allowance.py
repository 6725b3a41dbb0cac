"""How much of the guest's memory does each device read? Bound it, and see which one stops.

--policy vmm.examples.device_allowance:DeviceAllowance --policy-arg read=64M
"""

from __future__ import annotations

import sys

from vmm.policy import Allow, Decision, Deny, End, IoEvent, Policy, View


class DeviceAllowance(Policy):
    """A device may read `read` bytes of guest memory in all; then it stops, and needs a reset.

    What a device writes into the guest is free: nothing leaves the guest by that.
    """

    def __init__(self, read: int = 64 << 20) -> None:
        self._limit = read
        self.read: dict[str, int] = {}

    def on_io(self, event: IoEvent, view: View) -> Decision:
        if event.is_write:
            return Allow()
        read = self.read.get(event.device, 0) + event.area.size
        if read > self._limit:
            return Deny()
        self.read[event.device] = read
        return Allow()

    def on_exit(self, end: End, view: View) -> None:
        for device, count in sorted(self.read.items()):
            print(f"{device} read {count} bytes of guest memory", file=sys.stderr)
