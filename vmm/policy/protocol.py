"""The policy protocol: an event and a read-only view in, a decision out."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Protocol

from vmm.core.errors import UsageError
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import PageState, Residency

_LARGEST_ERRNO = 4095  # MAX_ERRNO in Linux' include/linux/err.h


class PolicyError(UsageError):
    """A policy's hook raised an exception, or answered with something that is no decision."""


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
    """Refuse the request: the guest gets -errno (1 to 4095), and nothing changes."""

    errno: int = errno.EACCES

    def __post_init__(self) -> None:
        if not isinstance(self.errno, int) or not 0 < self.errno <= _LARGEST_ERRNO:
            raise ValueError(f"Deny(errno={self.errno}): the guest would not take it for an error")


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
