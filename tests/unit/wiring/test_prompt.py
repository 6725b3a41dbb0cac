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


def test_first_queue_is_served_by_whoever_rings_and_the_rest_by_threads_of_its_own() -> None:
    loop = EventLoop()
    notifier = PromptNotifier(cast(Vm, NoIoeventfds()), loop, 2)
    served: list[tuple[str, int]] = []
    rest = threading.Semaphore(0)

    def notify(queue: int) -> None:
        served.append((threading.current_thread().name, queue))
        if len(served) == 1:
            notifier.ring(0)  # more to do, which is for a later turn
        else:
            rest.release()

    notifier.serve(notify)
    notifier.move(0xC080)
    vcpu = threading.Thread(target=lambda: notifier.ring(0), name="vcpu0")
    vcpu.start()
    vcpu.join()
    assert rest.acquire(timeout=30)
    notifier.ring(1)
    assert rest.acquire(timeout=30)

    assert served == [("vcpu0", 0), ("queue 0", 0), ("queue 1", 1)]
    notifier.close()  # which waits for the threads
    loop.close()
