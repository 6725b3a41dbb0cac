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
