"""Devices whose registers are one byte wide, made to answer accesses of every size."""

from __future__ import annotations

from abc import ABC, abstractmethod

ABSENT = 0xFF  # what a bus answers where nobody drives it


class BytePorts(ABC):
    """A port device in terms of bytes: wider accesses touch consecutive ports, low byte first.

    That is what an 8-bit bus does with a 16- or 32-bit access, and it leaves a device two
    methods that cannot meet a surprising size.
    """

    __slots__ = ()

    def read(self, offset: int, size: int) -> int:
        """`size` bytes from `offset`, little endian."""
        return sum(self.read_byte(offset + i) << 8 * i for i in range(size))

    def write(self, offset: int, size: int, value: int) -> None:
        """`size` bytes of `value` to `offset`, little endian."""
        for i in range(size):
            self.write_byte(offset + i, value >> 8 * i & 0xFF)

    @abstractmethod
    def read_byte(self, offset: int) -> int:
        """The byte at `offset`; whatever lies past the device reads as absent."""

    @abstractmethod
    def write_byte(self, offset: int, value: int) -> None:
        """Take a byte; whatever lies past the device is dropped."""
