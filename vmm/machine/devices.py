"""The devices of a machine, on their ports and interrupt lines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvm_bindings import KvmError, Vm, fdops, ioctls
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.devices.acpi_pm import AcpiPm
from vmm.arch.x86_64.devices.cmos import Cmos
from vmm.arch.x86_64.devices.i8042 import I8042
from vmm.arch.x86_64.devices.pci_conf1 import PciConf1
from vmm.core.event_loop import EventLoop, drain
from vmm.devices.bus import MemoryBus, PortBus
from vmm.devices.msix import MAX_VECTORS, MsixTable
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.serial16550 import Serial16550
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.devices.virtio.device import DeviceObserver
from vmm.devices.virtio.device import GuestMemory as GuestMemoryOfDevice
from vmm.devices.virtio.pci_transport import VirtioPciTransport
from vmm.devices.virtio.queue import SplitQueue
from vmm.machine.console import Console
from vmm.machine.interrupts import (
    EdgeLine,
    LevelLine,
    MessageRoutes,
    MsixMessages,
    open_eventfd,
)
from vmm.memory.guest_memory import GuestMemory

if TYPE_CHECKING:
    from vmm.devices.virtio.watched import Announce


class Doorbell:
    """The eventfds behind one virtio function's notify port: KVM signals, the loop serves."""

    def __init__(self, vm: Vm, loop: EventLoop, queues: int) -> None:
        self._vm = vm
        self._port: int | None = None
        self._loop = loop
        with ExitStack() as opened:
            self._eventfds = [open_eventfd(opened) for _ in range(queues)]
            self.close = opened.pop_all().close

    def serve(self, notify: Callable[[int], None]) -> None:
        """Call `notify(queue index)` on the loop's thread whenever the guest notifies a queue."""
        for index, eventfd in enumerate(self._eventfds):
            self._loop.add(eventfd, self._callback(eventfd, index, notify))

    def _callback(
        self, eventfd: int, index: int, notify: Callable[[int], None]
    ) -> Callable[[], None]:
        def notified() -> None:
            drain(eventfd)
            notify(index)

        return notified

    def ring(self, queue: int) -> None:
        """What KVM does for a notify that doesn't exit, for one that did."""
        os.eventfd_write(self._eventfds[queue], 1)

    def move(self, port: int | None) -> None:
        """The notify register is at `port` now (None: nowhere).

        Where KVM has no room for an ioeventfd, notifies exit and reach the register itself.
        """
        if self._port is not None:
            self._unbind(self._port, len(self._eventfds))
        self._port = None
        if port is not None and self._bind(port):
            self._port = port

    def _bind(self, port: int) -> bool:
        for index, eventfd in enumerate(self._eventfds):
            try:
                self._vm.ioeventfd(eventfd, port, 2, index, deassign=False)
            except KvmError:
                self._unbind(port, index)
                return False
        return True

    def _unbind(self, port: int, bound: int) -> None:
        for index, eventfd in enumerate(self._eventfds[:bound]):
            self._vm.ioeventfd(eventfd, port, 2, index, deassign=True)


def _can_use_messages(vm: Vm, memory: GuestMemory) -> bool:
    """Whether functions get MSI-X, besides the INTx that all of them have.

    The guest writes the table, which PCI wants in memory, with ordinary instructions that KVM
    has to fetch and decode: it reads guest code through the memslots' addresses, where it
    finds nothing of private pages that the host cannot reach.
    """
    readable = memory.private is None or memory.private.traits.private_access == "allowed"
    return readable and bool(vm.check_extension(ioctls.KVM_CAP_IRQ_ROUTING))


class Devices:
    """Everything on the port bus; `close` closes its eventfds, not the disks and the memory."""

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        loop: EventLoop,
        console: Console,
        disks: list[DiskFile],
        *,
        power_off: Callable[[], None],
        reset: Callable[[], None],
        watch: Callable[[str], Announce | None] = lambda device: None,
        observer_of: Callable[[str], DeviceObserver | None] = lambda device: None,
    ) -> None:
        """`watch(device)` is what is told of that device's accesses to guest memory, if any;
        `observer_of(device)` of the requests on its queues."""
        self.ports = PortBus()
        self.registers = MemoryBus()
        self._watch = watch
        self._observer_of = observer_of
        self._vm = vm
        self._memory = memory
        self._loop = loop
        self._lines: dict[int, LevelLine] = {}
        self._blocks: dict[str, VirtioBlock] = {}
        self._pci = PciBus(self.ports, self.registers)
        self._routes = MessageRoutes(vm) if _can_use_messages(vm, memory) else None
        self._pci.add(0, host_bridge())
        with ExitStack() as self._opened:
            self._connect(console, disks, power_off, reset)
            self.close = self._opened.pop_all().close

    def _connect(
        self,
        console: Console,
        disks: list[DiskFile],
        power_off: Callable[[], None],
        reset: Callable[[], None],
    ) -> None:
        line = EdgeLine(self._vm, layout.COM1_IRQ)
        self._opened.callback(line.close)
        self.serial = Serial16550(console.output, line, console.room)
        self.ports.add(layout.COM1_PORT, layout.COM1_PORTS, self.serial)
        self.ports.add(layout.I8042_PORT, layout.I8042_PORTS, I8042(reset))
        self.ports.add(layout.CMOS_PORT, layout.CMOS_PORTS, Cmos(time.time_ns))
        sci = self._level_line(layout.SCI_IRQ)
        pm = AcpiPm(time.monotonic_ns, power_off, reset, sci)
        sci.add_source(pm.interrupt_pending)
        self.ports.add(layout.ACPI_PM_PORT, layout.ACPI_PM_PORTS, pm)
        self.press_power_button = pm.press_power_button
        self.ports.add(layout.PCI_CONFIG_PORT, layout.PCI_CONFIG_PORTS, PciConf1(self._pci))
        # Index registers: a write means nothing before the data register is accessed.
        for port, size in ((layout.PCI_CONFIG_PORT, 4), (layout.CMOS_PORT, 1)):
            self._vm.coalesce_port_writes(port, size)
        for number, disk in enumerate(disks):
            self._add_disk(number, disk)

    def _add_disk(self, number: int, disk: DiskFile) -> None:
        slot = number + 1
        gsi = layout.pci_intx_gsi(slot)
        block = VirtioBlock(disk, fdops.punch_hole)
        line = self._level_line(gsi)
        doorbell = Doorbell(self._vm, self._loop, len(block.queue_sizes))
        self._opened.callback(doorbell.close)
        name = f"blk{number}"
        memory, make_queue = self._memory_of(name)
        transport = VirtioPciTransport(
            block,
            memory,
            line,
            bar_base=layout.virtio_bar_port(slot),
            interrupt_line=gsi,
            moved=doorbell.move,
            ring=doorbell.ring,
            observer=self._observer_of(name),
            make_queue=make_queue,
            msix=self._msix_table(len(block.queue_sizes) + 1),
            msix_base=layout.msix_bar_gpa(slot),
        )
        line.add_source(transport.interrupt_pending)
        doorbell.serve(transport.notify)
        self._pci.add(slot, transport.function)
        self._blocks[name] = block

    def _msix_table(self, vectors: int) -> MsixTable | None:
        """A function's table, one vector for each queue and one for changes of configuration."""
        if self._routes is None:
            return None
        messages = MsixMessages(self._vm, self._routes)
        self._opened.callback(messages.close)
        return MsixTable(min(vectors, MAX_VECTORS), messages)

    def _memory_of(self, device: str) -> tuple[GuestMemoryOfDevice, Callable[..., SplitQueue]]:
        """Guest memory as `device` gets to see it, and what makes its queues."""
        announce = self._watch(device)
        if announce is None:
            return self._memory, SplitQueue
        from vmm.devices.virtio.watched import WatchedMemory  # most runs do without

        watched = WatchedMemory(self._memory, announce)
        return watched, watched.queue

    def _level_line(self, gsi: int) -> LevelLine:
        if gsi not in self._lines:
            self._lines[gsi] = LevelLine(self._vm, gsi, self._loop)
            self._opened.callback(self._lines[gsi].close)
        return self._lines[gsi]

    def io_statistics(self) -> dict[str, dict[str, int]]:
        """Each device's counts by its name, for the report."""
        return {name: block.statistics.as_dict() for name, block in self._blocks.items()}
