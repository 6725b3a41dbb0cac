"""What if one noisy vCPU is slowed down, and the others are not?

--policy vmm.examples.vcpu_back_off:VcpuBackOff --policy-arg free=100
"""

from __future__ import annotations

import errno

from vmm.policy import Allow, Decision, Deny, Event, Policy, View


class VcpuBackOff(Policy):
    """Each vCPU has `free` shares; after that every share doubles its waiting time, up to a second.

    A share that comes too early gets EBUSY. A second without a share resets all of it.
    """

    def __init__(self, free: int = 100, first: float = 0.001) -> None:
        self._free, self._first = free, first
        self._vcpus: dict[int, tuple[int, float]] = {}  # shares so far, when the last one was

    def on_share(self, event: Event, view: View) -> Decision:
        count, last = self._vcpus.get(event.vcpu, (0, view.now))
        if view.now - last >= 1.0:
            count = 0
        beyond = count - self._free
        wait = min(1.0, self._first * 2.0 ** min(beyond, 20)) if beyond >= 0 else 0.0
        if view.now - last < wait:
            return Deny(errno.EBUSY)
        self._vcpus[event.vcpu] = (count + 1, view.now)
        return Allow()
