"""The matrix's rows and columns: every scheme, with each backing that it takes.

They are vmm.conversion.matrix's: a scheme or backing that has its entry there is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmm.conversion.matrix import BACKINGS, SCHEMES


class Combination(NamedTuple):
    """A scheme and a private backing, by their names on the command line."""

    scheme: str
    backing: str

    def __str__(self) -> str:
        return f"{self.scheme}/{self.backing}"


def combinations(names: Sequence[str] = SCHEMES) -> list[Combination]:
    """All there are of these schemes."""
    return [
        Combination(scheme, backing)
        for scheme in names
        for backing, schemes in BACKINGS.items()
        if scheme in schemes
    ]
