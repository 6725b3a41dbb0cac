"""The policy protocol: an event and a read-only view in, a decision out."""

from __future__ import annotations

from errno import EACCES
from typing import NamedTuple, Protocol

from vmm.core.errors import UsageError
from vmm.core.events import Kind
from vmm.core.ranges import Range
from vmm.memory.guest_memory import PageState, Residency

_LARGEST_ERRNO = 4095  # MAX_ERRNO in Linux' include/linux/err.h


class PolicyError(UsageError):
    """A policy's hook raised an exception, or answered with something that is no decision."""


class Event(NamedTuple):
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


class Allow:
    """Carry the request out."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allow)

    def __hash__(self) -> int:
        return hash(Allow)

    def __repr__(self) -> str:
        return "Allow()"


class Deny:
    """Refuse the request: the guest gets -errno (1 to 4095), and nothing changes."""

    __slots__ = ("errno",)

    def __init__(self, errno: int = EACCES) -> None:
        if not isinstance(errno, int) or not 0 < errno <= _LARGEST_ERRNO:
            raise ValueError(f"Deny(errno={errno}): the guest would not take it for an error")
        self.errno = errno

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Deny) and other.errno == self.errno

    def __hash__(self) -> int:
        return hash((Deny, self.errno))

    def __repr__(self) -> str:
        return f"Deny(errno={self.errno})"


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
