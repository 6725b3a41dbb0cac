"""DenyAfterBoot: what a guest shares while it boots is all that it will ever share."""

from __future__ import annotations

from typing import Any

from vmm.policy import Allow, Decision, Deny, Event, PageState, Policy, View
from vmm.policy.builtin.saved import flag, number


class DenyAfterBoot(Policy):
    """Refuses every share once the guest has booted; pages may become private at any time.

    Without `seconds` the boot ends with the first page that is given back: Linux frees its unused
    decrypted memory right before it starts init (its first act, an unshare of all RAM, gives
    nothing back). Else it ends that long after the first instruction.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        if not seconds >= 0:
            raise ValueError(f"seconds={seconds}: a boot takes 0 (up to the first unshare) or more")
        self._seconds = seconds
        self._started = 0.0
        self._unshared = False

    def on_boot(self, view: View) -> Decision:
        self._started = view.now
        return Allow()

    def on_save(self, view: View) -> object:
        return {"seconds": view.now - self._started, "unshared": self._unshared}

    def on_restore(self, state: Any, view: View) -> None:
        self._started = view.now - number(state, "seconds")
        self._unshared = flag(state, "unshared")

    def on_share(self, event: Event, view: View) -> Decision:
        return Deny() if self._booted(view.now) else Allow()

    def on_unshare(self, event: Event, view: View) -> Decision:
        states = view.states(event.area)
        self._unshared |= any(state is PageState.SHARED for _, state in states)
        return Allow()

    def _booted(self, now: float) -> bool:
        return now - self._started >= self._seconds if self._seconds else self._unshared
