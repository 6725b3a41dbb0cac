"""Interrupt lines behind eventfds: a device raises one by a call, KVM does the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from kvm_bindings import Vm
from vmm.core.event_loop import EventLoop, drain


def open_eventfd(owner: ExitStack) -> int:
    """A new non-blocking eventfd, closed by its owner."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    owner.callback(os.close, fd)
    return fd


class EdgeLine:
    """An edge-triggered line (ISA): every call is one pulse."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        with ExitStack() as opened:
            self._eventfd = open_eventfd(opened)
            vm.irqfd(self._eventfd, gsi)
            self.close = opened.pop_all().close

    def __call__(self) -> None:
        os.eventfd_write(self._eventfd, 1)


class LevelLine:
    """A level-triggered line (PCI INTx), shared by any number of sources.

    KVM keeps the line up until the guest's EOI, takes it down itself and says so on the
    resample eventfd; then it goes up again if a source still has something to say.
    """

    def __init__(self, vm: Vm, gsi: int, loop: EventLoop) -> None:
        self._pending: list[Callable[[], bool]] = []
        with ExitStack() as opened:
            self._eventfd = open_eventfd(opened)
            self._resamplefd = open_eventfd(opened)
            vm.irqfd(self._eventfd, gsi, self._resamplefd)
            loop.add(self._resamplefd, self._resample)
            self.close = opened.pop_all().close

    def add_source(self, pending: Callable[[], bool]) -> None:
        """`pending` says whether its device wants the line up."""
        self._pending.append(pending)

    def __call__(self) -> None:
        os.eventfd_write(self._eventfd, 1)

    def _resample(self) -> None:
        drain(self._resamplefd)
        if any(pending() for pending in self._pending):
            os.eventfd_write(self._eventfd, 1)
