"""A GICv2m frame: the address that PCI functions send messages to, each of which is an SPI.

Arm Server Base System Architecture 3.0, appendix E. The guest reads which SPIs are the frame's.
What functions write to SETSPI never comes this way: KVM raises the SPI (see `messages`).
"""

from __future__ import annotations

TYPER, SETSPI, IDENTIFICATION = 0x008, 0x040, 0xFCC
REGISTER_SIZE = 4


class GicV2m:
    """A page of 32-bit registers; other accesses read zero, and all writes are dropped."""

    __slots__ = ("_typer",)

    def __init__(self, first_intid: int, count: int) -> None:
        """The frame's SPIs by their INTIDs."""
        self._typer = first_intid << 16 | count

    def read(self, offset: int, size: int) -> int:
        """MSI_TYPER: the first INTID in bits 25:16, how many in bits 9:0. The identification of
        the implementer is zero, which is nobody's, so that no workaround applies."""
        return self._typer if offset == TYPER and size == REGISTER_SIZE else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A vCPU may send a message to itself through SETSPI; no driver does."""
