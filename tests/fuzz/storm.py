"""A guest that moves BARs and rewrites MSI-X entries, and what KVM is asked for by it.

The board and the devices are the machine's own; KVM is a stand-in that counts, has as much room as
it likes, and refuses now and then.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from kvm_bindings import KvmError, MessageRoute, Vm
from tests.support.memory import guest_memory
from vmm.arch.x86_64.board import PcBoard
from vmm.arch.x86_64.layout import FIRST_MESSAGE_GSI
from vmm.core.event_loop import EventLoop
from vmm.devices.msix import CAPABILITY
from vmm.devices.virtio.balloon import VirtioBalloon
from vmm.devices.virtio.console_backend import open_console
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.pci_function import NOTIFY
from vmm.devices.virtio.rng import VirtioRng
from vmm.wiring.devices import Devices

PORTS = (0xC000, 0xC100, 0xC200, 0xD000, 0xFF00, 0, 0x3F8 & ~0xFF, 0x1_0000)
ADDRESSES = (0xE000_0000, 0xE000_1000, 0xE100_0000, 0xFFFF_F000, 0)


class CountingKvm:
    """Tables of ioeventfds and routes, and how many calls there were of each kind."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.refuses = False
        self.calls: dict[str, int] = {"ioeventfd": 0, "deassign": 0, "routing": 0, "irqfd": 0}
        self.ioeventfds: set[tuple[int, int]] = set()
        self.messages: list[MessageRoute] = []

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if self.refuses and name != "deassign" and self._rng.random() < 0.1:
            raise KvmError(name, self._rng.choice((errno.ENOSPC, errno.ENOMEM)))

    def check_extension(self, capability: int) -> int:
        return 1

    def coalesce_port_writes(self, port: int, size: int) -> bool:
        return False

    def irqfd(self, eventfd: int, gsi: int, resamplefd: int | None = None) -> None:
        self._called("irqfd")

    def set_gsi_routing(
        self, pins: list[tuple[int, int, int]], messages: list[MessageRoute]
    ) -> None:
        self._called("routing")
        assert len({message.gsi for message in messages}) == len(messages)
        self.messages = messages

    def ioeventfd(
        self, eventfd: int, address: int, size: int, queue: int, *, port: bool, deassign: bool
    ) -> None:
        self._called("deassign" if deassign else "ioeventfd")
        if deassign:
            self.ioeventfds.remove((address, queue))
        else:
            assert (address, queue) not in self.ioeventfds  # EEXIST
            self.ioeventfds.add((address, queue))


class Guest:
    """Accesses, each of which costs KVM little; `check` looks at what is there."""

    def __init__(self, rng: random.Random, folder: Path, stack: ExitStack) -> None:
        self.rng = rng
        self.kvm = CountingKvm(rng)
        self.devices: dict[str, VirtioDevice] = {
            "rng": VirtioRng(),
            "balloon": VirtioBalloon(),
            "console": open_console([f"file={folder / 'c'}", f"file={folder / 'd'},name=x"]),
        }
        for device in self.devices.values():
            stack.callback(device.close)
        loop = EventLoop()
        stack.callback(loop.close)
        memory = stack.enter_context(guest_memory())
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        wired = Devices(
            cast(Vm, self.kvm), memory, loop, self.devices, cast(Any, PcBoard),
            output=nothing, room=nothing, power_off=nothing, reset=nothing,
        )  # fmt: skip
        stack.callback(wired.close)
        self.wired = wired
        self.board = cast(PcBoard, wired.board)
        self.transports = wired._transports
        self.vectors = sum(len(each.queue_sizes) + 1 for each in self.devices.values())
        self.notifies = 0
        self.controls = [self._control(slot) for slot in self._slots]

    @property
    def _slots(self) -> range:
        return range(1, len(self.devices) + 1)

    def config(self, slot: int, register: int, size: int) -> int:
        return self.board.pci.read_config(0, slot, 0, register, size)

    def set_config(self, slot: int, register: int, size: int, value: int) -> None:
        self.board.pci.write_config(0, slot, 0, register, size, value)

    def _control(self, slot: int) -> int:
        at = self.config(slot, 0x34, 1)
        while self.config(slot, at, 1) != CAPABILITY:
            at = self.config(slot, at + 1, 1)
        return at + 2

    def _command(self, slot: int) -> None:
        self.set_config(slot, 0x04, 2, self.rng.choice((0, 1, 2, 3, 7, 7, 0x407)))

    def _registers(self, slot: int) -> None:
        self.set_config(slot, 0x10, 4, self.rng.choice(PORTS) | 1)

    def _table(self, slot: int) -> None:
        self.set_config(slot, 0x14, 4, self.rng.choice(ADDRESSES))

    def _enable(self, slot: int) -> None:
        self.set_config(slot, self.controls[slot - 1], 2, self.rng.choice((0, 0x8000, 0xC000)))

    def _entry(self, slot: int) -> None:
        found = self.board.registers.find(self.config(slot, 0x14, 4) & ~0xF)
        if found is not None:
            size = self.rng.choice((4, 4, 8))
            value = self.rng.choice((0, 1, 0xFEE0_0000, self.rng.getrandbits(8 * size)))
            found[0].write(self.rng.randrange(0, 16 * 10, 4), size, value & (1 << 8 * size) - 1)

    def _notify(self, slot: int) -> None:
        self.notifies += 1
        port = (self.config(slot, 0x10, 4) & ~3) + NOTIFY
        self.board.ports.write(port, self.rng.choice((2, 2, 4)), self.rng.randrange(8))

    def access(self) -> None:
        """One access by a vCPU, most of them to what is likely to be there."""
        before = dict(self.kvm.calls)
        kinds = (self._command, self._registers, self._table, self._enable,
                 self._entry, self._entry, self._notify, self._notify)  # fmt: skip
        self.rng.choice(kinds)(self.rng.choice(self._slots))
        spent = {name: count - before[name] for name, count in self.kvm.calls.items()}
        queues = max(len(each.queue_sizes) for each in self.devices.values())
        assert spent["routing"] <= 1 and spent["ioeventfd"] <= 1, spent
        assert spent["deassign"] <= queues and spent["irqfd"] <= queues + 1, spent

    def check(self) -> None:
        """KVM has what the registers say, and no more than there are queues and vectors."""
        calls = self.kvm.calls
        assert calls["deassign"] <= calls["ioeventfd"] <= self.notifies
        assert len(self.kvm.messages) <= self.vectors
        assert all(
            FIRST_MESSAGE_GSI <= message.gsi < FIRST_MESSAGE_GSI + self.vectors
            for message in self.kvm.messages
        )
        for function in self.board.pci._functions.values():
            for bar in function._bars:
                assert bar.mapped in (None, function._wanted(bar)), "a BAR is where it was"
        places = {each.notify_address: each for each in self.transports if each.notify_address}
        for address, queue in self.kvm.ioeventfds:
            assert queue < len(places[address]._device.queue_sizes)
