"""Counts of conversions, as the report shows them."""

from __future__ import annotations

from vmm.core.events import Kind


class Tally:
    """One direction: requests made, and bytes whose state changed.

    `denied` requests were refused by the policy; `failed` ones were invalid, or a step failed
    and was rolled back.
    """

    __slots__ = ("bytes", "calls", "denied", "failed")

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0
        self.denied = 0
        self.failed = 0

    def as_dict(self) -> dict[str, int]:
        return {
            "calls": self.calls,
            "bytes": self.bytes,
            "denied": self.denied,
            "failed": self.failed,
        }


class Accounting:
    """Both directions."""

    def __init__(self) -> None:
        self.share = Tally()
        self.unshare = Tally()

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {"share": self.share.as_dict(), "unshare": self.unshare.as_dict()}

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
