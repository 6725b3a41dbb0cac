"""Counts of conversions, as the report shows them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.core.events import Kind


@dataclass(slots=True)
class Tally:
    """One direction: requests made, bytes whose state changed, requests refused or failed."""

    calls: int = 0
    bytes: int = 0
    denied: int = 0
    """Refused by the policy."""
    failed: int = 0
    """Invalid, or a step failed and was rolled back."""


@dataclass(slots=True)
class Accounting:
    """Both directions."""

    share: Tally = field(default_factory=Tally)
    unshare: Tally = field(default_factory=Tally)

    def of(self, kind: Kind) -> Tally:
        return self.share if kind is Kind.SHARE else self.unshare


class Refinements:
    """What policies made of requests beyond yes and no, in requests and bytes."""

    __slots__ = ("deferred_bytes", "discards_failed", "partial", "reclaimed_bytes", "widened")

    def __init__(self) -> None:
        self.partial = 0
        """Carried out in part, and answered with an error."""
        self.widened = 0
        """Carried out together with deferred pages around them."""
        self.deferred_bytes = 0
        """Unshared with the discard of the shared side put off."""
        self.reclaimed_bytes = 0
        """Of these, shared again before the discard."""
        self.discards_failed = 0
        """Late discards that the host's kernel refused; they are tried again."""

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in sorted(self.__slots__)}
