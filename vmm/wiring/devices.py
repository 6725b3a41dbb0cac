"""The devices of a machine: the architecture's board, and virtio functions in its PCI slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from kvm_bindings import Vm
from vmm.core.event_loop import EventLoop
from vmm.core.lean_typing import TYPE_CHECKING, Any
from vmm.memory.guest_memory import GuestMemory
from vmm.wiring.board import BoardParts
from vmm.wiring.interrupts import Lines, MsixMessages

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State
    from vmm.devices.msix import MsixTable
    from vmm.devices.own import GuardedRegisters, PciDevice, PortDevice
    from vmm.devices.virtio.device import DeviceObserver, VirtioDevice
    from vmm.devices.virtio.device import GuestMemory as GuestMemoryOfDevice
    from vmm.devices.virtio.iommu import VirtioIommu
    from vmm.devices.virtio.pci_transport import VirtioPciTransport
    from vmm.devices.virtio.queue import SplitQueue
    from vmm.devices.virtio.watched import Announce
    from vmm.memory.engines import Engine
    from vmm.wiring.board import Board
    from vmm.wiring.notifications import QueueNotifier


class Devices:
    """Everything on the buses; `close` closes its eventfds, not what devices have opened.

    `virtio` are the devices of the PCI slots from 1 on, by the names that the report has.
    """

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        loop: EventLoop,
        virtio: Mapping[str, VirtioDevice],
        make_board: Callable[[BoardParts], Board],
        *,
        output: Callable[[bytes], None],
        room: Callable[[], None],
        power_off: Callable[[], None],
        reset: Callable[[], None],
        watch: Callable[[str], Announce | None] = lambda device: None,
        observer_of: Callable[[str], DeviceObserver | None] = lambda device: None,
        iommu: VirtioIommu | None = None,
        own: Mapping[str, PortDevice | PciDevice] | None = None,
    ) -> None:
        """`output`, `room`, `power_off` and `reset` as in BoardParts. `watch(device)` is what is
        told of that device's accesses to guest memory, if any; `observer_of(device)` of the
        requests on its queues. `iommu`: the one of `virtio` that is in front of others. `own`: the
        user's own register devices, whose PCI functions follow those of `virtio`."""
        self._iommu = iommu
        self._watch = watch
        self._observer_of = observer_of
        self._vm = vm
        self._memory = memory
        self._loop = loop
        self._transports: list[VirtioPciTransport] = []
        self._virtio = virtio
        self._notifiers: list[QueueNotifier] = []
        self._engines: dict[str, Engine] = {}
        self._lent_engines: dict[str, Engine] = {}
        self._own: dict[str, GuardedRegisters] = {}
        with ExitStack() as self._opened:
            self._lines = Lines(vm, loop, self._opened)
            parts = BoardParts(
                vm,
                loop,
                self._lines,
                self._opened,
                output=output,
                room=room,
                power_off=power_off,
                reset=reset,
            )
            self.board = make_board(parts)
            self._routes = self.board.message_routes(memory.private) if virtio else None
            for number, (name, device) in enumerate(virtio.items(), start=1):
                self._add_virtio(number, name, device)
            if own:
                self._add_own(own)
            self.close = self._opened.pop_all().close

    def _add_virtio(self, number: int, name: str, device: VirtioDevice) -> None:
        # A machine without devices starts sooner.
        from vmm.devices.virtio.pci_transport import VirtioPciTransport
        from vmm.wiring.notifications import QueueNotifier, ThreadedQueueNotifier

        slot = self.board.slot(number)
        line = self._lines.level(slot.gsi)
        kind: type[QueueNotifier] = ThreadedQueueNotifier if device.concurrent else QueueNotifier
        if device.prompt:
            from vmm.wiring.prompt import PromptNotifier

            kind = PromptNotifier
        if device.served_elsewhere:
            from vmm.wiring.vhost_user import ForwardingNotifier

            kind = ForwardingNotifier
        notifier = kind(self._vm, self._loop, len(device.queue_sizes), slot.registers_in_io)
        self._opened.callback(notifier.close)
        self._notifiers.append(notifier)
        memory, make_queue = self._memory_of(name, number, device)
        msix, messages = self._msix_table(len(device.queue_sizes) + 1)
        transport = VirtioPciTransport(
            device,
            memory,
            line,
            bar_base=slot.registers_base,
            bar_in_io=slot.registers_in_io,
            interrupt_line=slot.interrupt_line,
            moved=notifier.move,
            ring=notifier.ring,
            notified=notifier.notified,
            observer=self._observer_of(name),
            make_queue=make_queue,
            msix=msix,
            msix_base=slot.msix_base,
        )
        device.watch = self._loop.watch_in_time
        if device.apart:
            device.set_timer = self._loop.set_timer  # type: ignore[attr-defined]  # ProcessDevice's
        self._opened.callback(device.disconnect)
        line.add_source(transport.interrupt_pending)
        if device.served_elsewhere:
            from vmm.wiring.vhost_user import wire

            wire(device, self._vm, self._memory, transport, notifier, msix, messages, self._opened)
        notifier.serve(transport.notify)
        device.start()
        self.board.pci.add(number, transport.function)
        self._transports.append(transport)

    def _add_own(self, own: Mapping[str, PortDevice | PciDevice]) -> None:
        from vmm.devices.own import PciDevice
        from vmm.devices.virtio.watched import WatchedMemory
        from vmm.wiring.own_devices import add_own

        slot = len(self._virtio)
        for name, device in own.items():
            is_pci = isinstance(device, PciDevice)
            slot += is_pci
            announce = self._watch(name)
            memory: GuestMemoryOfDevice = self._memory
            if announce is not None:
                memory = WatchedMemory(memory, announce)
            self._own[name] = add_own(
                device, self.board, slot if is_pci else None, self._lines.level, memory
            )

    def _msix_table(self, vectors: int) -> tuple[MsixTable | None, MsixMessages | None]:
        """A function's table, one vector for each queue and one for changes of configuration."""
        if self._routes is None:
            return None, None
        from vmm.devices.msix import MAX_VECTORS, MsixTable  # a run without devices does without

        messages = MsixMessages(self._vm, self._routes)
        self._opened.callback(messages.close)
        return MsixTable(min(vectors, MAX_VECTORS), messages), messages

    def _memory_of(
        self, name: str, number: int, device: VirtioDevice
    ) -> tuple[GuestMemoryOfDevice, Callable[..., SplitQueue]]:
        """Guest memory as a device in slot `number` gets to see it, and what makes its queues."""
        memory: GuestMemoryOfDevice = self._memory
        engine = None
        if device.engine is not None:
            from vmm.memory.engines import make_engine

            engine = make_engine(device.engine, self._memory.shared, self._vm.fd)
            self._opened.callback(engine.close)
            self._engines[name] = engine
        announce = self._watch(name)
        if self._iommu is not None:
            from vmm.wiring.iommu import memory_behind

            memory, announce, lent = memory_behind(
                self._iommu, self._memory, name, number, device, engine, announce, self._opened
            )
            if lent is not None:
                self._lent_engines[name] = lent
        elif engine is not None:
            memory = self._memory.through(engine)
        if announce is None:
            return memory, device.queue_type
        from vmm.devices.virtio.watched import WatchedMemory  # most runs do without

        watched = WatchedMemory(memory, announce)
        return watched, watched.queue

    def hold(self, timeout: float) -> ExitStack:
        """Until what is returned is closed, by this thread, devices leave guest memory alone.

        Raises TimeoutError when they take longer to come to rest, all together (seconds).
        """
        deadline = time.monotonic() + timeout
        with ExitStack() as held:
            for transport in self._transports:
                held.enter_context(transport.held(max(deadline - time.monotonic(), 0)))
            return held.pop_all()

    def state(self, timeout: float) -> State:
        """What a snapshot keeps of the board and the virtio devices, which are held. Raises
        TimeoutError when what is under way takes longer (seconds), NotSaved, OSError."""
        from vmm.core.saved import NotSaved

        if self._own:
            raise NotSaved(f"{', '.join(self._own)}: the user's own devices can't be saved")
        deadline = time.monotonic() + timeout
        for transport in self._transports:
            transport.finish(max(deadline - time.monotonic(), 0))
        pairs = zip(self._virtio, self._transports, strict=True)
        return {
            "board": self.board.state(),
            "virtio": [{"name": name, "transport": each.state()} for name, each in pairs],
        }

    def restore(self, saved: Saved) -> None:
        """Be in that state, with the same devices; then, when all else is there, `resume`.
        Raises BadState, OSError."""
        for inner, name, transport in zip(
            saved.each("virtio", len(self._transports)),
            self._virtio,
            self._transports,
            strict=True,
        ):
            if inner.text("name") != name:
                raise inner.bad(f"it is {inner.text('name')!r:.40}, and here is {name}")
            each = inner.inner("transport")
            transport.restore(each)
            each.finish()
            inner.finish()
        board = saved.inner("board")
        self.board.restore(board)
        board.finish()
        self.board.pci.remap()

    def resume(self) -> None:
        """The restored machine is about to run."""
        for transport in self._transports:
            transport.resume()
        self._lines.raise_pending()

    def end(self, timeout: float) -> bool:
        """No request is served any more; False when one under way takes longer (seconds)."""
        for device in self._virtio.values():
            device.hear_out(timeout)
        return all(notifier.end(timeout) for notifier in self._notifiers)

    def restart(self, name: str) -> None:
        """Start a device's process anew, or take up the back end that runs in the last one's place.
        Raises LookupError where neither can be, HostError, PyvmmError."""
        device = self._virtio.get(name)
        if device is None:
            known = ", ".join(self._virtio) or "none"
            raise LookupError(f"there is no device {name:.40}; there are: {known}")
        if not (device.apart or device.served_elsewhere):
            raise LookupError(
                f"{name} is in pyvmm's own process; only a device with the setting process, as in "
                "--disk FILE,process, or with vhost-user=SOCKET can be started again"
            )
        device.restart()  # type: ignore[attr-defined]  # ProcessDevice's, VhostUserDevice's

    def io_statistics(self) -> dict[str, dict[str, Any]]:
        """Each device's counts by its name, for the report; a disk's engine with its own."""
        counts: dict[str, dict[str, Any]] = {}
        for name, device in self._virtio.items():
            counts[name] = device.statistics.as_dict()
            if name in self._engines:
                counts[name]["engine"] = self._engines[name].as_dict()
            if name in self._lent_engines:
                counts[name]["engine_lent"] = self._lent_engines[name].as_dict()
        for name, registers in self._own.items():
            counts[name] = registers.as_dict()
        return counts
