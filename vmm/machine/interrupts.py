"""Interrupts behind eventfds: a device raises a line or sends a message by a call, KVM the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock

from kvm_bindings import MessageRoute, Vm, ioctls
from vmm.arch.x86_64 import layout
from vmm.core.errors import tell
from vmm.core.event_loop import EventLoop, drain
from vmm.memory.backing import Backing


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


def can_use_messages(vm: Vm, private: Backing | None) -> bool:
    """Whether functions get MSI-X, besides the INTx that all of them have.

    The guest writes the table, which PCI wants in memory, with ordinary instructions that KVM
    has to fetch and decode: it reads guest code through the memslots' addresses, where it
    finds nothing of private pages that the host cannot reach.
    """
    readable = private is None or private.traits.private_access == "allowed"
    return readable and bool(vm.check_extension(ioctls.KVM_CAP_IRQ_ROUTING))


class MessageRoutes:
    """KVM's routing table: the PC's interrupt lines, and a GSI for each message in use."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._messages: dict[int, tuple[int, int]] = {}
        self._lock = Lock()

    def set(self, gsi: int | None, address: int, data: int) -> int:
        """Have `gsi` (None: a new one) send the message; the GSI. Raises KvmError, unchanged."""
        with self._lock:
            used = layout.FIRST_MESSAGE_GSI + len(self._messages)
            number = used if gsi is None else gsi
            messages = {**self._messages, number: (address, data)}
            self._vm.set_gsi_routing(
                layout.interrupt_pins(),
                [MessageRoute(each, *message) for each, message in messages.items()],
            )
            self._messages = messages
            return number


class MsixMessages:
    """The messages of one function by vector, each with an eventfd from its first use on."""

    def __init__(self, vm: Vm, routes: MessageRoutes) -> None:
        self._vm = vm
        self._routes = routes
        self._eventfds: dict[int, int] = {}
        self._gsis: dict[int, int] = {}
        self._told = False
        self._opened = ExitStack()
        self.close = self._opened.close

    def route(self, vector: int, address: int, data: int) -> None:
        """From now on the vector's message is that one; the old one, where KVM has no room."""
        try:
            gsi = self._routes.set(self._gsis.get(vector), address, data)
            if vector not in self._gsis:
                self._gsis[vector] = gsi
                eventfd = open_eventfd(self._opened)
                self._vm.irqfd(eventfd, gsi)
                self._eventfds[vector] = eventfd
        except OSError as error:  # KvmError is one
            if not self._told:  # the guest may make it happen as often as it likes
                tell(f"interrupt message {vector} of a PCI function is lost: {error}")
            self._told = True

    def signal(self, vector: int) -> None:
        """Send the vector's message; dropped while it has none."""
        eventfd = self._eventfds.get(vector)
        if eventfd is not None:
            os.eventfd_write(eventfd, 1)
