"""Can a booted guest live with the pages that it has shared while it booted?

--policy vmm.examples.lockdown:Lockdown --policy-arg seconds=20
"""

from __future__ import annotations

from vmm.policy import Allow, Decision, Deny, Event, Kill, Policy, Range, View


class Lockdown(Policy):
    """After `seconds` a guest may share again what it had shared before, and nothing else.

    Anything else is refused, or with `kill` the end of the run. A hook is asked once for a
    request, so a large share that has one new page is refused as a whole.
    """

    def __init__(self, seconds: float = 20.0, kill: bool = False) -> None:
        self._seconds, self._kill = seconds, kill
        self._started = 0.0
        self._pages: set[int] = set()

    def on_boot(self, view: View) -> Decision:
        self._started = view.now
        return Allow()

    def on_share(self, event: Event, view: View) -> Decision:
        if view.now - self._started < self._seconds:
            self._pages.update(_pages(event.area))
            return Allow()
        if self._pages.issuperset(_pages(event.area)):
            return Allow()
        return Kill(f"{event.area} was not shared in the boot") if self._kill else Deny()


def _pages(area: Range) -> range:
    return range(area.start >> 12, area.end >> 12)
