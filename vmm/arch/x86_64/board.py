"""The PC around the guest: serial port, RTC, power management, i8042, PCI by ports 0xcf8/0xcfc."""

from __future__ import annotations

import time

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.devices.acpi_pm import AcpiPm
from vmm.arch.x86_64.devices.cmos import Cmos
from vmm.arch.x86_64.devices.i8042 import I8042
from vmm.arch.x86_64.devices.pci_conf1 import PciConf1
from vmm.core.lean_typing import TYPE_CHECKING, cast
from vmm.devices.bus import MemoryBus, PortBus
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.serial16550 import Serial16550
from vmm.wiring.board import BoardParts, Slot
from vmm.wiring.interrupts import MessageRoutes, can_use_messages

if TYPE_CHECKING:
    from kvm_bindings.x86_64 import Vm
    from vmm.core.saved import Saved, State, Stateful
    from vmm.memory.backing import Backing


class PcBoard:
    """See vmm.wiring.board.Board."""

    has_ports = True

    def __init__(self, parts: BoardParts) -> None:
        """Raises KvmError."""
        self._vm = cast("Vm", parts.vm)  # X86Platform's
        self.ports = PortBus()
        self.registers = MemoryBus()
        self.pci = PciBus(self.ports, self.registers)
        self.pci.add(0, host_bridge())
        line = parts.lines.edge(layout.COM1_IRQ)
        self.serial = Serial16550(parts.output, line, parts.room)
        self.ports.add(layout.COM1_PORT, layout.COM1_PORTS, self.serial)
        i8042, cmos = I8042(parts.reset), Cmos(time.time_ns)
        self.ports.add(layout.I8042_PORT, layout.I8042_PORTS, i8042)
        self.ports.add(layout.CMOS_PORT, layout.CMOS_PORTS, cmos)
        sci = parts.lines.level(layout.SCI_IRQ)
        pm = AcpiPm(time.monotonic_ns, parts.power_off, parts.reset, sci)
        sci.add_source(pm.interrupt_pending)
        self.ports.add(layout.ACPI_PM_PORT, layout.ACPI_PM_PORTS, pm)
        self._pm = pm
        conf1 = PciConf1(self.pci)
        self.ports.add(layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_PORTS, conf1)
        self._stateful: dict[str, Stateful] = {
            "serial": self.serial, "i8042": i8042, "cmos": cmos, "pm": pm, "pci": conf1,
        }  # fmt: skip
        # Index registers: a write means nothing before the data register is accessed. And the
        # serial port's transmitter: drivers look at its status before they go on.
        for port, size in ((layout.PCI_CONFIG_PORT, 4), (layout.CMOS_PORT, 1)):
            self._vm.coalesce_port_writes(port, size)
        self.coalesces_output = self._vm.coalesce_port_writes(layout.COM1_PORT, 1)

    def state(self) -> State:
        return {name: device.state() for name, device in self._stateful.items()}

    def restore(self, saved: Saved) -> None:
        for name, device in self._stateful.items():
            inner = saved.inner(name)
            device.restore(inner)
            inner.finish()

    def put_forward(self, nanoseconds: int) -> None:
        self._pm.put_forward(nanoseconds)

    def press_power_button(self) -> bool:
        return self._pm.press_power_button()

    def slot(self, number: int) -> Slot:
        gsi = layout.pci_intx_gsi(number)
        return Slot(
            gsi,
            interrupt_line=gsi,
            registers_in_io=True,
            registers_base=layout.virtio_bar_port(number),
            msix_base=layout.msix_bar_gpa(number),
        )

    def message_routes(self, private: Backing | None) -> MessageRoutes | None:
        if not can_use_messages(self._vm, private):
            return None
        return MessageRoutes(self._vm, layout.interrupt_pins(), layout.FIRST_MESSAGE_GSI)
