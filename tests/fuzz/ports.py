"""Everything that answers port I/O, for IN and OUT of any port, size and value.

PCI configuration space included: BARs are moved over the other devices while they are used.
"""

from __future__ import annotations

import os
import random

from tests.support.fake_memory import FakeMemory
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.devices.acpi_pm import AcpiPm
from vmm.arch.x86_64.devices.cmos import Cmos
from vmm.arch.x86_64.devices.i8042 import I8042
from vmm.arch.x86_64.devices.pci_conf1 import PciConf1
from vmm.devices.bus import PORT_SPACE, PortBus
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.serial16550 import Serial16550
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.devices.virtio.pci_transport import VirtioPciTransport
from vmm.devices.virtio.rng import VirtioRng

PORTS = (
    *range(layout.COM1_PORT, layout.COM1_PORT + layout.COM1_PORTS),
    *range(layout.I8042_PORT, layout.I8042_PORT + layout.I8042_PORTS),
    *range(layout.CMOS_PORT, layout.CMOS_PORT + layout.CMOS_PORTS),
    *range(layout.ACPI_PM_PORT, layout.ACPI_PM_PORT + layout.ACPI_PM_PORTS),
    *range(layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_PORT + layout.PCI_CONFIG_PORTS),
)


class Board:
    """The devices of a machine on their ports, two virtio functions among them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._now = 10**18
        self.ports = PortBus()
        self.ends = self.output = 0
        self.serial = Serial16550(self._print, lambda: None)
        self.ports.add(layout.COM1_PORT, layout.COM1_PORTS, self.serial)
        self.ports.add(layout.I8042_PORT, layout.I8042_PORTS, I8042(self._end))
        self.ports.add(layout.CMOS_PORT, layout.CMOS_PORTS, Cmos(self._clock))
        self.ports.add(
            layout.ACPI_PM_PORT, layout.ACPI_PM_PORTS, AcpiPm(self._clock, self._end, self._end)
        )
        self.pci = PciBus(self.ports)
        self.ports.add(layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_PORTS, PciConf1(self.pci))
        self.pci.add(0, host_bridge())
        self.memory = FakeMemory()
        self.disk = os.memfd_create("disk")
        os.truncate(self.disk, 4096)
        block = VirtioBlock(DiskFile(self.disk, "disk", 8, False, b""))
        for slot, device in ((1, block), (2, VirtioRng())):
            transport = VirtioPciTransport(
                device,
                self.memory,
                lambda: None,
                bar_base=layout.virtio_bar_port(slot),
                interrupt_line=5,
            )
            self.pci.add(slot, transport.function)

    def check(self) -> None:
        """The devices that can't move are where they were, and answer."""
        assert os.fstat(self.disk).st_size == 4096
        assert self.ports.read(layout.COM1_PORT + 5, 1) != 0xFF
        assert self.ports.read(layout.PCI_CONFIG_PORT, 4) & 3 == 0
        assert self.pci.read_config(0, 0, 0, 0, 4) == 0x1237_8086

    def close(self) -> None:
        self.memory.close()
        os.close(self.disk)

    def _print(self, data: bytes) -> None:
        self.output += len(data)

    def _end(self) -> None:
        self.ends += 1

    def _clock(self) -> int:
        self._now += self.rng.randrange(10**9)
        return self._now

    def step(self) -> None:
        rng = self.rng
        kind = rng.random()
        if kind < 0.3:
            self._configure()
        elif kind < 0.4:
            accepted = self.serial.receive(rng.randbytes(rng.choice((0, 1, 100))))
            assert 0 <= accepted <= 100
        port = rng.choice(
            (rng.choice(PORTS), rng.choice(PORTS), rng.randrange(0xC000, 0xC300),
             rng.randrange(PORT_SPACE))
        )  # fmt: skip
        size = rng.choice((1, 2, 4))
        if rng.random() < 0.5:
            value = self.ports.read(port, size)
            assert 0 <= value < 1 << (8 * size), f"IN of {size} bytes at {port:#x} is {value:#x}"
        else:
            value = rng.choice((0, 1, 0x80, 0xFE, 0xFF, rng.getrandbits(32)))
            self.ports.write(port, size, value & ((1 << (8 * size)) - 1))

    def _configure(self) -> None:
        """An access through 0xcf8 and 0xcfc such as makes sense: a function, a register."""
        rng = self.rng
        slot = rng.choice((0, 1, 2, 1, 2, 3, 31))
        register = rng.choice((0x04, 0x10, 0x3C, rng.randrange(256))) & ~3
        self.ports.write(layout.PCI_CONFIG_PORT, 4, 1 << 31 | slot << 11 | register)
        size = rng.choice((1, 2, 4))
        data = layout.PCI_CONFIG_PORT + 4 + rng.randrange(4)
        if rng.random() < 0.5:
            assert 0 <= self.ports.read(data, size) < 1 << (8 * size)
        else:
            value = rng.choice(
                (0, 1, 3, 5, 7, 0xFFFF_FFFF, *PORTS[::5], 0xC001, 0xC101, rng.getrandbits(32))
            )
            self.ports.write(data, size, value & ((1 << (8 * size)) - 1))
