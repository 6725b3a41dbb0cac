"""The policy protocol: an event and a read-only view in, a decision out."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Protocol

from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import PageState, Residency


@dataclass(frozen=True, slots=True)
class Event:
    """A validated request: `area` is page-aligned guest RAM, GPAs without the C-bit."""

    kind: Kind
    area: Range
    vcpu: int
    doorbell: str


class View(Protocol):
    """What a policy may see of the guest's state; reading it changes nothing."""

    @property
    def ram_bytes(self) -> int: ...
    def states(self, within: Range | None = None) -> list[tuple[Range, PageState]]: ...
    def bytes_in(self, state: PageState) -> int: ...
    def residency(self) -> Residency: ...


@dataclass(frozen=True, slots=True)
class Allow:
    """Carry the request out."""


@dataclass(frozen=True, slots=True)
class Deny:
    """Refuse the request: the guest gets -errno, and nothing changes."""

    errno: int = errno.EACCES


Decision = Allow | Deny


class Policy:
    """Allows everything; a policy is a subclass that overrides the hooks it wants.

    Hooks run on the vCPU's thread while the guest waits, one at a time.
    """

    def on_share(self, event: Event, view: View) -> Decision:
        """The guest asks to make `event.area` shared."""
        return Allow()

    def on_unshare(self, event: Event, view: View) -> Decision:
        """The guest asks to make `event.area` private."""
        return Allow()
