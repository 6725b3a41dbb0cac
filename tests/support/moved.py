"""A machine with one virtio device, and one that goes on from what was saved of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.support.fake_memory import FakeMemory
from tests.support.virtio_machine import VirtioMachine
from vmm.core.saved import Saved
from vmm.devices.virtio.device import VirtioDevice


def carried(state: Any) -> Any:
    """A state as it comes back from a file."""
    return json.loads(json.dumps(state))


class Moved:
    """A machine, and one that goes on from it, with the same memory."""

    def __init__(self, make: Callable[[], VirtioDevice]) -> None:
        self.old = VirtioMachine(make())
        self.make = make
        self.opened: list[VirtioMachine] = [self.old]

    def state(self) -> Any:
        with self.old.transport.held(1):
            self.old.transport.finish(1)
            return carried(self.old.transport.state())

    def restored(self, state: Any) -> VirtioMachine:
        memory = FakeMemory(self.old.memory.size)
        memory.poke(self.old.memory.peek(memory.size, 0), 0)
        new = VirtioMachine(self.make(), memory)
        self.opened.append(new)
        saved = Saved(state, "here")
        new.transport.restore(saved)
        saved.finish()
        new.pci.remap()
        new.queues = self.old.queues
        for queue in new.queues:
            queue.memory = memory
        new._next = self.old._next
        return new

    def gone_on(self) -> VirtioMachine:
        """One that goes on from now, and has come to rest."""
        new = self.restored(self.state())
        new.transport.resume()
        new.settle()
        return new

    def close(self) -> None:
        for machine in self.opened:
            machine.close()
