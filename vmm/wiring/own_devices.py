"""Puts the user's own register devices on the buses, with guest memory and an interrupt line."""

from __future__ import annotations

from collections.abc import Callable

from vmm.core.errors import UsageError
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.own_code import called
from vmm.devices.bus import BusConflict
from vmm.devices.own import DeviceMemory, GuardedRegisters, PciDevice, PortDevice
from vmm.devices.pci import COMMAND, COMMAND_INTX_DISABLE, PciFunction

if TYPE_CHECKING:
    from vmm.wiring.board import Board, Slot
    from vmm.wiring.interrupts import LevelLine


class OwnFunction(PciFunction):
    """The PCI function of a PciDevice: BAR 0, and INTA as the device has it."""

    def __init__(
        self, device: PciDevice, registers: GuardedRegisters, slot: Slot, line: LevelLine
    ) -> None:
        super().__init__(device.vendor, device.device, device.class_code, revision=1)
        self._device = device
        self._line = line
        if slot.registers_in_io and not device.in_memory:
            self.add_io_bar(0, slot.registers_base, device.bar_size, registers)
        else:
            # Where other functions have the MSI-X table, and this one has none.
            base = slot.msix_base if slot.registers_in_io else slot.registers_base
            self.add_memory_bar(0, base, max(device.bar_size, 0x1000), registers)
        self.set_interrupt(slot.interrupt_line)
        line.add_source(self.wants_line)

    def asserts_interrupt(self) -> bool:
        return self._device.is_asserted

    def wants_line(self) -> bool:
        """Whether the line has to be up."""
        return self._device.is_asserted and self.intx_enabled

    def raised(self) -> None:
        """The device asserts its interrupt."""
        if self.intx_enabled:
            self._line()

    def write_config(self, register: int, size: int, value: int) -> None:
        was_silent = self.command & COMMAND_INTX_DISABLE
        super().write_config(register, size, value)
        if was_silent and register <= COMMAND + 1 and self.wants_line():
            self._line()


def add_own(
    device: PortDevice | PciDevice,
    board: Board,
    slot: int | None,
    level: Callable[[int], LevelLine],
    memory: DeviceMemory,
) -> GuardedRegisters:
    """Put the device on its bus; `slot` is the PCI slot of a PciDevice. Raises UsageError."""
    registers = GuardedRegisters(device)
    device.memory = memory
    if isinstance(device, PortDevice):
        name = type(device).__name__
        if not board.has_ports:
            raise UsageError(f"{name}: this architecture has no I/O ports; use vmm.PciDevice")
        try:
            board.ports.add(device.ports.start, len(device.ports), registers)
        except BusConflict as error:
            raise UsageError(f"{name}: {error}") from None
    else:
        assert slot is not None
        place = board.slot(slot)
        function = OwnFunction(device, registers, place, level(place.gsi))
        device.connect(function.raised)
        board.pci.add(slot, function)
    called(device, "start", device.start)
    return registers
