"""The matrix's rows and columns: every scheme, with each backing that it takes.

They are vmm.conversion.matrix's: a scheme or backing that has its entry there is tested.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.conversion.matrix import BACKINGS, SCHEMES


class Combination(NamedTuple):
    """A scheme and a private backing, by their names on the command line."""

    scheme: str
    backing: str

    def __str__(self) -> str:
        return f"{self.scheme}/{self.backing}"


def combinations() -> list[Combination]:
    """All there are, by scheme."""
    return [
        Combination(scheme, backing)
        for scheme in SCHEMES
        for backing, schemes in BACKINGS.items()
        if scheme in schemes
    ]
