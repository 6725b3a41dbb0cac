"""LeastPrivilege: a device touches what its driver named to it, and nothing else."""

from __future__ import annotations

from vmm.policy import Allow, Decision, Deny, IoEvent, LendEvent, Policy, View

LARGEST = 4 << 20
"""What a stock Linux kernel has in one piece at most: its allocator's largest block, order 10."""


class LeastPrivilege(Policy):
    """Stops a device that touches shared memory which no ring and no descriptor names.

    All that is shared could be touched by any device otherwise. A buffer counts while its
    request is being carried out, and in the direction that its descriptor gives.

    Where the guest has a virtual IOMMU, it names buffers by mapping them: a mapping of more than
    `largest` bytes of private memory is no buffer, and refused, or one mapping of everything would
    make the IOMMU pointless.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        if largest < 0:
            raise ValueError(f"largest={largest}: give a number of bytes, as in 4M")
        self._largest = largest

    def on_lend(self, event: LendEvent, view: View) -> Decision:
        return Allow() if event.area.size <= self._largest else Deny()

    def on_io(self, event: IoEvent, view: View) -> Decision:
        return Allow() if event.named else Deny()
