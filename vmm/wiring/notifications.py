"""Notifications of virtio queues: KVM signals an eventfd, the device loop or a thread serves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from kvm_bindings import KvmError, Vm
from vmm.core.event_loop import EventLoop, drain
from vmm.core.thread_signals import leave_signals_to_the_main_thread
from vmm.wiring.interrupts import open_eventfd


class QueueNotifier:
    """The eventfds behind one virtio function's notify register: KVM signals, the loop serves.

    KVM is told of the register when the guest has notified a queue there by an exit, and then of
    that queue alone. A guest that moves its register without end moves nothing in KVM: each of its
    accesses costs one ioctl at most, and one more when the register moves away again.
    """

    def __init__(self, vm: Vm, loop: EventLoop, queues: int, in_io: bool = True) -> None:
        """`in_io`: whether the register is an I/O port; else it is in memory."""
        self._vm = vm
        self._in_io = in_io
        self._address: int | None = None
        self._bound: set[int] = set()
        self._refused = False
        # Held while KVM is waited for: by vCPUs alone.
        self._moving = threading.Lock()
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
        """What KVM does for a notify that doesn't exit: have the queue served."""
        os.eventfd_write(self._eventfds[queue], 1)

    def notified(self, queue: int) -> None:
        """The guest has notified a queue by an exit: serve it, and spare the guest the next exit.

        Where KVM has no room for an ioeventfd, notifies go on to exit and come here.
        """
        self.ring(queue)
        if queue in self._bound:
            return  # a write of another size
        with self._moving:
            if self._address is None or self._refused or queue in self._bound:
                return
            try:
                self._bind(queue, self._address)
                self._bound.add(queue)
            except KvmError:
                self._refused = True  # until it moves

    def end(self, timeout: float) -> bool:
        """Serve no more; False when what is under way takes longer than that many seconds."""
        del timeout  # nothing is: the loop has ended
        return True

    def move(self, address: int | None) -> None:
        """The notify register is at that port or address now (None: nowhere)."""
        with self._moving:
            if self._address is not None:
                for queue in sorted(self._bound):
                    self._bind(queue, self._address, deassign=True)
            self._bound.clear()
            self._refused = False
            self._address = address

    def _bind(self, queue: int, address: int, *, deassign: bool = False) -> None:
        eventfd = self._eventfds[queue]
        self._vm.ioeventfd(eventfd, address, 2, queue, port=self._in_io, deassign=deassign)


class ThreadedQueueNotifier(QueueNotifier):
    """Serves each queue on a thread of its own: for devices that wait for the host's disks.

    What a queue's thread fails with is raised on the loop's thread, and ends the run there.
    """

    def __init__(self, vm: Vm, loop: EventLoop, queues: int, in_io: bool = True) -> None:
        super().__init__(vm, loop, queues, in_io)
        self._close_eventfds, self.close = self.close, self._close
        self._threads: list[threading.Thread] = []
        self._ending = False
        self._error: BaseException | None = None
        with ExitStack() as opened:
            opened.callback(self._close_eventfds)
            self._failed = open_eventfd(opened)
            loop.add(self._failed, self._raise_error)
            self._close_eventfds = opened.pop_all().close

    def serve(self, notify: Callable[[int], None]) -> None:
        """Call `notify(queue index)` on that queue's thread whenever the guest notifies it."""
        for index, eventfd in enumerate(self._eventfds):
            os.set_blocking(eventfd, True)
            thread = threading.Thread(
                target=self._work, args=(index, eventfd, notify), name=f"queue {index}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _work(self, index: int, eventfd: int, notify: Callable[[int], None]) -> None:
        leave_signals_to_the_main_thread()
        try:
            while True:
                try:
                    os.eventfd_read(eventfd)
                except InterruptedError:
                    continue  # Python doesn't repeat this one by itself
                if self._ending:
                    return
                notify(index)
        except BaseException as error:
            self._error = error
            os.eventfd_write(self._failed, 1)

    def _raise_error(self) -> None:
        drain(self._failed)
        if self._error is not None:
            raise self._error

    def end(self, timeout: float) -> bool:
        """End the threads, after the requests under way; False when that takes longer."""
        self._ending = True
        for index in range(len(self._threads)):
            self.ring(index)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _close(self) -> None:
        self.end(threading.TIMEOUT_MAX)
        self._close_eventfds()
