"""Notifications of a device whose driver waits for its answers: see VirtioDevice.prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvm_bindings import Vm
from vmm.core.event_loop import EventLoop
from vmm.wiring.notifications import ThreadedQueueNotifier


class PromptNotifier(ThreadedQueueNotifier):
    """A notify of queue 0 exits, and is served on the vCPU's thread. Those of the others, and what
    a turn has left to do, are for the queues' own threads: such a device may wait for others."""

    def __init__(self, vm: Vm, loop: EventLoop, queues: int, in_io: bool = True) -> None:
        super().__init__(vm, loop, queues, in_io)
        self._notify: Callable[[int], None] = lambda queue: None
        self._serving = threading.local()

    def serve(self, notify: Callable[[int], None]) -> None:
        def on_its_thread(queue: int) -> None:
            self._serving.now = True
            notify(queue)

        self._notify = notify
        super().serve(on_its_thread)

    def move(self, address: int | None) -> None:
        """No ioeventfd: the guest's write has to exit."""

    def ring(self, queue: int) -> None:
        """The guest has notified a queue, or the device has more to do for one."""
        serving = self._serving
        if queue or self._ending or getattr(serving, "now", False):
            super().ring(queue)
            return
        serving.now = True
        try:
            self._notify(queue)
        finally:
            serving.now = False
