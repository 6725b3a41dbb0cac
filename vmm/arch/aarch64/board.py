"""The board around the guest: serial port, RTC, GICv2m frame, PCI with its configuration space
in memory. There are no I/O ports, and no power button yet."""

from __future__ import annotations

import time

from vmm.arch.aarch64 import layout
from vmm.arch.aarch64.devices.gic_v2m import GicV2m
from vmm.arch.aarch64.devices.pci_ecam import PciEcam
from vmm.arch.aarch64.devices.pl031 import Pl031
from vmm.arch.aarch64.messages import V2mRoutes
from vmm.arch.aarch64.platform import refuse_to_save
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.devices.bus import MemoryBus, PortBus
from vmm.devices.pci import PciBus, PciFunction
from vmm.devices.serial16550 import Serial16550
from vmm.wiring.board import BoardParts, Slot

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State
    from vmm.memory.backing import Backing

_HOST_BRIDGE = (0x1B36, 0x0008, 0x06_0000)
"""Vendor, device and class of 0:0.0: the plain PCI Express host bridge of QEMU's virt machine."""


class ArmBoard:
    """See vmm.wiring.board.Board."""

    has_ports = False

    def __init__(self, parts: BoardParts) -> None:
        """Raises KvmError."""
        self._vm = parts.vm
        self.reset = parts.reset
        """What a reset of the machine comes to; the guest asks for it through PSCI."""
        self.ports = PortBus()
        self.registers = MemoryBus()
        self.pci = PciBus(self.ports, self.registers)
        self.pci.add(0, PciFunction(*_HOST_BRIDGE))
        line = parts.lines.edge(layout.UART_SPI)
        self.serial = Serial16550(parts.output, line, parts.room)
        frame = GicV2m(layout.FIRST_SPI_INTID + layout.FIRST_MESSAGE_SPI, layout.MESSAGE_SPIS)
        add = self.registers.add
        add(layout.UART_GPA, layout.UART_SIZE, self.serial)
        add(layout.RTC_GPA, layout.RTC_SIZE, Pl031(time.time_ns))
        add(layout.V2M_GPA, layout.V2M_SIZE, frame)
        add(layout.PCI_ECAM_GPA, layout.PCI_ECAM_SIZE, PciEcam(self.pci))
        self.coalesces_output = self._vm.coalesce_mmio_writes(layout.UART_GPA, 1)

    def press_power_button(self) -> bool:
        return False

    def state(self) -> State:
        refuse_to_save()

    def restore(self, saved: Saved) -> None:
        refuse_to_save()

    def put_forward(self, nanoseconds: int) -> None:
        refuse_to_save()

    def slot(self, number: int) -> Slot:
        spi = layout.pci_intx_spi(number)
        return Slot(
            spi,
            interrupt_line=0xFF,  # "unknown": the device tree says it
            registers_in_io=False,
            registers_base=layout.virtio_bar_gpa(number),
            msix_base=layout.msix_bar_gpa(number),
        )

    def message_routes(self, private: Backing | None) -> V2mRoutes:
        # Always: the processor describes accesses to tables, so that KVM needs no look at code,
        # and a protected VM has the routing table although its KVM_CAP_IRQ_ROUTING says 0.
        return V2mRoutes(self._vm)
