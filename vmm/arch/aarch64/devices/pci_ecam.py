"""PCI configuration space in memory (ECAM), of bus 0.

PCI Express Base Specification 5.0, 7.2.2: 4 KiB for each function, of which these functions have
the first 256 bytes.
"""

from __future__ import annotations

from vmm.core.lean_typing import Protocol
from vmm.devices.bus import all_ones

FUNCTION_SHIFT, DEVICE_SHIFT, BUS_SHIFT = 12, 15, 20
REGISTERS = 0x1000
CONFIG_SIZE = 256
DWORD = 4


class ConfigSpace(Protocol):
    """What this bridge needs of a PCI bus; absent functions answer all ones and drop writes.

    `register` and `size` never cross a dword: 0 <= register < 256, size 1, 2 or 4.
    """

    def read_config(self, bus: int, device: int, function: int, register: int, size: int) -> int:
        """The value of `size` bytes at `register`."""
        ...

    def write_config(
        self, bus: int, device: int, function: int, register: int, size: int, value: int
    ) -> None:
        """Write `size` bytes at `register`."""
        ...


class PciEcam:
    """The window of one bus: 1 MiB. What crosses a dword, or lies past a function's 256 bytes,
    reads all ones (there are no extended capabilities) and writes nothing."""

    __slots__ = ("_space",)

    def __init__(self, space: ConfigSpace) -> None:
        self._space = space

    def read(self, offset: int, size: int) -> int:
        """`size` bytes of the function whose registers `offset` is in."""
        if not _is_access(offset, size):
            return all_ones(size)
        where = (offset >> BUS_SHIFT, offset >> DEVICE_SHIFT & 0x1F, offset >> FUNCTION_SHIFT & 7)
        return self._space.read_config(*where, offset % REGISTERS, size) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes of the function's registers."""
        if not _is_access(offset, size):
            return
        where = (offset >> BUS_SHIFT, offset >> DEVICE_SHIFT & 0x1F, offset >> FUNCTION_SHIFT & 7)
        self._space.write_config(*where, offset % REGISTERS, size, value & all_ones(size))


def _is_access(offset: int, size: int) -> bool:
    inside = offset % DWORD + size <= DWORD and size in (1, 2, 4)
    return inside and offset % REGISTERS < CONFIG_SIZE
