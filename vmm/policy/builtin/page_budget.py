"""PageBudget: a bound on the host memory that a guest's pages really take."""

from __future__ import annotations

import errno

from vmm.policy import Allow, Decision, Deny, Event, Policy, View


class PageBudget(Policy):
    """Refuses a share with ENOMEM while it could take both sides over `limit` resident bytes.

    Unlike a quota it counts the pages that exist, private ones included: a share of pages that
    the guest never touches costs nothing later on, so that a guest may be let through that shares
    more than it uses. Only what is shared is held back: what a guest writes to, it gets.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit={limit}: give a number of bytes, as in 400M")
        self._limit = limit

    def on_share(self, event: Event, view: View) -> Decision:
        resident = view.residency()
        taken = resident.private_bytes + resident.shared_bytes
        return Allow() if taken + event.area.size <= self._limit else Deny(errno.ENOMEM)
