"""PCI configuration mechanism #1: an address port and a data port onto configuration space.

PCI Local Bus Specification 3.0, 3.2.2.3.2.
"""

from __future__ import annotations

from vmm.core.lean_typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

ADDRESS, DATA, END = 0, 4, 8  # offsets from port 0xcf8
ENABLE = 1 << 31
ADDRESS_MASK = 0x80FF_FFFC  # enable, bus, device, function, register; the rest reads 0
DWORD = 4


class ConfigSpace(Protocol):
    """What this bridge needs of a PCI bus; absent functions answer all ones and drop writes.

    `register` and `size` never cross a dword: 0 <= register < 256, size 1, 2 or 4.
    """

    def read_config(self, bus: int, device: int, function: int, register: int, size: int) -> int:
        """The value of `size` bytes at `register`."""

    def write_config(
        self, bus: int, device: int, function: int, register: int, size: int, value: int
    ) -> None:
        """Write `size` bytes at `register`."""


class PciConf1:
    """Ports 0xcf8-0xcff. The address port takes dwords only, as on every host bridge."""

    __slots__ = ("_address", "_space")

    def __init__(self, space: ConfigSpace) -> None:
        self._space = space
        self._address = 0

    def state(self) -> State:
        """See vmm.core.saved.Stateful."""
        return {"address": self._address}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful."""
        self._address = saved.number("address", 0xFFFF_FFFF) & ADDRESS_MASK

    def read(self, offset: int, size: int) -> int:
        """The address register, or configuration space; all ones for anything else."""
        if offset == ADDRESS and size == DWORD:
            return self._address
        ones = (1 << 8 * size) - 1
        if not self._reaches_data(offset, size):
            return ones
        return self._space.read_config(*self._function(), self._register(offset), size) & ones

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the address register, or write configuration space; anything else is dropped."""
        if offset == ADDRESS and size == DWORD:
            self._address = value & ADDRESS_MASK
        elif self._reaches_data(offset, size):
            value &= (1 << 8 * size) - 1
            self._space.write_config(*self._function(), self._register(offset), size, value)

    def _reaches_data(self, offset: int, size: int) -> bool:
        inside = offset >= DATA and offset + size <= END and size in (1, 2, 4)
        return inside and bool(self._address & ENABLE)

    def _function(self) -> tuple[int, int, int]:
        address = self._address
        return address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 7

    def _register(self, offset: int) -> int:
        return self._address & 0xFC | offset - DATA
