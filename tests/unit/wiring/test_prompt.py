"""A device whose driver waits for its answers is served where the guest asks."""

from __future__ import annotations

import threading
from typing import cast

from kvm_bindings import Vm
from vmm.core.event_loop import EventLoop
from vmm.wiring.prompt import PromptNotifier


class NoIoeventfds:
    def ioeventfd(self, *given: object, **others: object) -> None:
        raise AssertionError("the guest's write has to exit")


def test_first_queue_is_served_by_whoever_rings_and_the_rest_by_the_loop() -> None:
    loop = EventLoop()
    notifier = PromptNotifier(cast(Vm, NoIoeventfds()), loop, 2)
    served: list[tuple[str, int]] = []

    def notify(queue: int) -> None:
        served.append((threading.current_thread().name, queue))
        if len(served) == 1:
            notifier.ring(0)  # more to do, which is for a later turn
        if len(served) == 3:
            loop.stop()

    notifier.serve(notify)
    notifier.move(0xC080)
    vcpu = threading.Thread(target=lambda: notifier.ring(0), name="vcpu0")
    vcpu.start()
    vcpu.join()
    assert served == [("vcpu0", 0)]

    notifier.ring(1)
    loop.run()

    assert sorted(served[1:]) == [("MainThread", 0), ("MainThread", 1)]
    notifier.close()
    loop.close()
