"""The devices of a machine, on their ports and interrupt lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvm_bindings.x86_64 import Vm
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.devices.acpi_pm import AcpiPm
from vmm.arch.x86_64.devices.cmos import Cmos
from vmm.arch.x86_64.devices.i8042 import I8042
from vmm.arch.x86_64.devices.pci_conf1 import PciConf1
from vmm.core.event_loop import EventLoop
from vmm.devices.bus import MemoryBus, PortBus
from vmm.devices.pci import PciBus, host_bridge
from vmm.devices.serial16550 import Serial16550
from vmm.machine.console import Console
from vmm.machine.interrupts import (
    EdgeLine,
    LevelLine,
    MessageRoutes,
    MsixMessages,
    can_use_messages,
)
from vmm.memory.guest_memory import GuestMemory

if TYPE_CHECKING:
    from vmm.devices.msix import MsixTable
    from vmm.devices.virtio.device import DeviceObserver, VirtioDevice
    from vmm.devices.virtio.device import GuestMemory as GuestMemoryOfDevice
    from vmm.devices.virtio.pci_transport import VirtioPciTransport
    from vmm.devices.virtio.queue import SplitQueue
    from vmm.devices.virtio.watched import Announce
    from vmm.machine.doorbell import Doorbell
    from vmm.memory.engines import Engine


class Devices:
    """Everything on the port bus; `close` closes its eventfds, not what devices have opened.

    `virtio` are the devices of the PCI slots from 1 on, by the names that the report has.
    """

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        loop: EventLoop,
        console: Console,
        virtio: Mapping[str, VirtioDevice],
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
        self._transports: list[VirtioPciTransport] = []
        self._virtio = virtio
        self._doorbells: list[Doorbell] = []
        self._engines: dict[str, Engine] = {}
        self._pci = PciBus(self.ports, self.registers)
        self._routes = MessageRoutes(vm) if can_use_messages(vm, memory.private) else None
        self._pci.add(0, host_bridge())
        with ExitStack() as self._opened:
            self._connect(console, power_off, reset)
            self.close = self._opened.pop_all().close

    def _connect(
        self,
        console: Console,
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
        for slot, (name, device) in enumerate(self._virtio.items(), start=1):
            self._add_virtio(slot, name, device)

    def _add_virtio(self, slot: int, name: str, device: VirtioDevice) -> None:
        # A machine without devices starts sooner.
        from vmm.devices.virtio.pci_transport import VirtioPciTransport
        from vmm.machine.doorbell import Doorbell, ThreadedDoorbell

        gsi = layout.pci_intx_gsi(slot)
        line = self._level_line(gsi)
        kind = ThreadedDoorbell if device.concurrent else Doorbell
        doorbell = kind(self._vm, self._loop, len(device.queue_sizes))
        self._opened.callback(doorbell.close)
        self._doorbells.append(doorbell)
        memory, make_queue = self._memory_of(name, device.engine)
        transport = VirtioPciTransport(
            device,
            memory,
            line,
            bar_base=layout.virtio_bar_port(slot),
            interrupt_line=gsi,
            moved=doorbell.move,
            ring=doorbell.ring,
            observer=self._observer_of(name),
            make_queue=make_queue,
            msix=self._msix_table(len(device.queue_sizes) + 1),
            msix_base=layout.msix_bar_gpa(slot),
        )
        device.watch = self._loop.watch
        self._opened.callback(device.disconnect)
        line.add_source(transport.interrupt_pending)
        doorbell.serve(transport.notify)
        device.start()
        self._pci.add(slot, transport.function)
        self._transports.append(transport)

    def _msix_table(self, vectors: int) -> MsixTable | None:
        """A function's table, one vector for each queue and one for changes of configuration."""
        if self._routes is None:
            return None
        from vmm.devices.msix import MAX_VECTORS, MsixTable  # a run without devices does without

        messages = MsixMessages(self._vm, self._routes)
        self._opened.callback(messages.close)
        return MsixTable(min(vectors, MAX_VECTORS), messages)

    def _memory_of(
        self, device: str, engine_name: str | None
    ) -> tuple[GuestMemoryOfDevice, Callable[..., SplitQueue]]:
        """Guest memory as `device` gets to see it, and what makes its queues."""
        from vmm.devices.virtio.queue import SplitQueue

        memory: GuestMemoryOfDevice = self._memory
        if engine_name is not None:
            from vmm.memory.engines import make_engine

            engine = make_engine(engine_name, self._memory.shared)
            self._opened.callback(engine.close)
            self._engines[device] = engine
            memory = self._memory.through(engine)
        announce = self._watch(device)
        if announce is None:
            return memory, SplitQueue
        from vmm.devices.virtio.watched import WatchedMemory  # most runs do without

        watched = WatchedMemory(memory, announce)
        return watched, watched.queue

    def _level_line(self, gsi: int) -> LevelLine:
        if gsi not in self._lines:
            self._lines[gsi] = LevelLine(self._vm, gsi, self._loop)
            self._opened.callback(self._lines[gsi].close)
        return self._lines[gsi]

    def hold(self, timeout: float) -> ExitStack:
        """Until what is returned is closed, by this thread, devices leave guest memory alone.

        Raises TimeoutError when one takes longer to come to rest (seconds).
        """
        with ExitStack() as held:
            for transport in self._transports:
                held.enter_context(transport.held(timeout))
            return held.pop_all()

    def end(self, timeout: float) -> bool:
        """No request is served any more; False when one under way takes longer (seconds)."""
        return all(doorbell.end(timeout) for doorbell in self._doorbells)

    def io_statistics(self) -> dict[str, dict[str, Any]]:
        """Each device's counts by its name, for the report; a disk's engine with its own."""
        counts: dict[str, dict[str, Any]] = {}
        for name, device in self._virtio.items():
            counts[name] = device.statistics.as_dict()
            if name in self._engines:
                counts[name]["engine"] = self._engines[name].as_dict()
        return counts
