"""A virtio device's PCI face: identity, the register BAR and the capabilities that describe it.

struct virtio_pci_cap (virtio 1.2, 4.1.4): u8 cap_vndr, cap_next, cap_len, cfg_type, bar, id,
padding[2]; le32 offset, length; then what the type adds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmm.core.lean_typing import Protocol
from vmm.devices import msix
from vmm.devices.bus import MEMORY_PAGE
from vmm.devices.msix import MsixTable
from vmm.devices.pci import COMMAND, COMMAND_INTX_DISABLE, PciFunction

VENDOR = 0x1AF4
MODERN_DEVICE_BASE = 0x1040
BAR_SIZE = 0x100
MSIX_BAR = 1

# Where the structures are in BAR 0. Reads of device configuration may run into the notify
# register, which is write-only: virtio-blk's structure is 60 bytes long.
COMMON_CFG, COMMON_CFG_SIZE = 0x00, 0x38
ISR_STATUS, ISR_SIZE = 0x40, 0x01
DEVICE_CFG, DEVICE_CFG_MAX = 0x48, BAR_SIZE - 0x48
NOTIFY, NOTIFY_SIZE = 0x80, 0x04
NOTIFY_MULTIPLIER = 0  # every queue is notified at the same place, by its index as the value

_CAP_VENDOR = 0x09
_CAP_COMMON, _CAP_NOTIFY, _CAP_ISR, _CAP_DEVICE, _CAP_PCI_CFG = 1, 2, 3, 4, 5
_CAP_HEADER = 2  # cap_vndr and cap_next, which the capability list writes
_CAP_BODY = struct.Struct("<BBBBHII")
_CAP_SIZE = _CAP_HEADER + _CAP_BODY.size
_CAP_BAR, _CAP_OFFSET = 4, 8


class BarRegisters(Protocol):
    """What answers in the BAR: a port device that says whether it wants an interrupt."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...

    def has_cause(self) -> bool: ...

    def interrupts_enabled(self) -> None: ...


class VirtioPciFunction(PciFunction):
    """Type-0 header of a modern virtio device with its registers in BAR 0, of I/O ports or of
    memory (a page then), and in BAR 1 the MSI-X table, where the function has one.

    `moved(first port or address, or None)` follows BAR 0, for the listener to notifies.
    """

    def __init__(
        self,
        registers: BarRegisters,
        *,
        device_id: int,
        pci_class: int,
        config_size: int,
        bar_base: int,
        bar_in_io: bool,
        interrupt_line: int,
        moved: Callable[[int | None], None],
        msix_table: MsixTable | None = None,
        msix_base: int = 0,
    ) -> None:
        # 4.1.2.1: revision 1 or higher and a subsystem id of 0x40 or higher: not transitional.
        super().__init__(
            VENDOR,
            MODERN_DEVICE_BASE + device_id,
            pci_class,
            revision=1,
            subsystem=(VENDOR, 0x40 + device_id),
        )
        if config_size > DEVICE_CFG_MAX:
            raise ValueError(f"device configuration of {config_size} bytes: no room in the BAR")
        self._registers = registers
        if bar_in_io:
            self.add_io_bar(0, bar_base, BAR_SIZE, registers, moved)
        else:
            self.add_memory_bar(0, bar_base, MEMORY_PAGE, registers, moved)
        self.set_interrupt(interrupt_line)
        self._msix = msix_table
        self._msix_control = 0
        if msix_table is not None:
            self.add_memory_bar(MSIX_BAR, msix_base, msix.BAR_SIZE, msix_table)
            at = self.add_capability(msix.CAPABILITY, msix_table.capability(MSIX_BAR))
            self._msix_control = at + _CAP_HEADER
            writable = msix.CONTROL_ENABLE | msix.CONTROL_MASK_ALL
            self.set_writable(self._msix_control, writable.to_bytes(2, "little"))
        multiplier = NOTIFY_MULTIPLIER.to_bytes(4, "little")
        self._add_structure(_CAP_COMMON, COMMON_CFG, COMMON_CFG_SIZE)
        self._add_structure(_CAP_ISR, ISR_STATUS, ISR_SIZE)
        self._add_structure(_CAP_NOTIFY, NOTIFY, NOTIFY_SIZE, multiplier)
        if config_size:
            self._add_structure(_CAP_DEVICE, DEVICE_CFG, config_size)
        # 4.1.4.9: the BAR through configuration space, for drivers that can't do port I/O yet.
        self._window = self._add_structure(_CAP_PCI_CFG, 0, 0, bytes(4))
        self.set_writable(self._window + _CAP_BAR, b"\xff")
        self.set_writable(self._window + _CAP_OFFSET, b"\xff" * 12)

    def asserts_interrupt(self) -> bool:
        return self._registers.has_cause()

    def read_config(self, register: int, size: int) -> int:
        data = self._window + _CAP_SIZE
        access = self._window_access() if register < data + 4 and register + size > data else None
        if access is not None:
            value = self._registers.read(*access)
            self._config[data : data + access[1]] = value.to_bytes(access[1], "little")
        return super().read_config(register, size)

    def write_config(self, register: int, size: int, value: int) -> None:
        data = self._window + _CAP_SIZE
        was_silent = self.command & COMMAND_INTX_DISABLE
        super().write_config(register, size, value)
        if register < data + 4 and register + size > data:
            access = self._window_access()
            if access is not None:
                written = self._config[data : data + access[1]]
                self._registers.write(*access, int.from_bytes(written, "little"))
        elif self._msix and self._msix_control - size < register < self._msix_control + 2:
            control = self._config[self._msix_control : self._msix_control + 2]
            self._msix.control(int.from_bytes(control, "little"))
        elif was_silent and register <= COMMAND + 1 and not self.command & COMMAND_INTX_DISABLE:
            self._registers.interrupts_enabled()

    def _take_config(self, config: bytes) -> None:
        super()._take_config(config)
        if self._msix is not None:
            control = self._config[self._msix_control : self._msix_control + 2]
            self._msix.control(int.from_bytes(control, "little"))

    def _add_structure(self, kind: int, offset: int, length: int, extra: bytes = b"") -> int:
        body = _CAP_BODY.pack(_CAP_SIZE + len(extra), kind, 0, 0, 0, offset, length)
        return self.add_capability(_CAP_VENDOR, body + extra)

    def _window_access(self) -> tuple[int, int] | None:
        """Offset and size that the window is set to, or None where they are no access."""
        bar = self._config[self._window + _CAP_BAR]
        offset, length = struct.unpack_from("<II", self._config, self._window + _CAP_OFFSET)
        if bar != 0 or length not in (1, 2, 4) or offset % length or offset + length > BAR_SIZE:
            return None
        return offset, length
