"""Interrupts behind eventfds: a device raises a line or sends a message by a call, KVM the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from threading import Lock

from kvm_bindings import MessageRoute, Vm, ioctls
from vmm.core.errors import in_words, tell
from vmm.core.event_loop import EventLoop, drain
from vmm.core.lean_typing import NamedTuple, Protocol
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
        self.raise_pending()

    def raise_pending(self) -> None:
        """Have the line go up if a source has something to say."""
        if any(pending() for pending in self._pending):
            os.eventfd_write(self._eventfd, 1)


class Lines:
    """The machine's interrupt lines by GSI, made at first use and closed with `opened`."""

    def __init__(self, vm: Vm, loop: EventLoop, opened: ExitStack) -> None:
        self._vm = vm
        self._loop = loop
        self._opened = opened
        self._levels: dict[int, LevelLine] = {}

    def edge(self, gsi: int) -> EdgeLine:
        """A new source of pulses on a line. Raises KvmError."""
        line = EdgeLine(self._vm, gsi)
        self._opened.callback(line.close)
        return line

    def level(self, gsi: int) -> LevelLine:
        """The level-triggered line, one for all of its sources. Raises KvmError."""
        if gsi not in self._levels:
            self._levels[gsi] = LevelLine(self._vm, gsi, self._loop)
            self._opened.callback(self._levels[gsi].close)
        return self._levels[gsi]

    def raise_pending(self) -> None:
        """Have all level-triggered lines go up that a source wants up."""
        for line in self._levels.values():
            line.raise_pending()


def can_use_messages(vm: Vm, private: Backing | None) -> bool:
    """Whether functions get MSI-X on x86, besides the INTx that all of them have.

    The guest writes the table, which PCI wants in memory, with ordinary instructions that KVM
    has to fetch and decode: it reads guest code through the memslots' addresses, where it
    finds nothing of private pages that the host cannot reach.
    """
    readable = private is None or private.traits.private_access == "allowed"
    return readable and bool(vm.check_extension(ioctls.KVM_CAP_IRQ_ROUTING))


class Message(NamedTuple):
    """What a GSI (None: one that has none yet) is to send: a write of `data` to `address`."""

    gsi: int | None
    address: int
    data: int


class Routes(Protocol):
    """What turns messages that the guest has set up into GSIs by which KVM sends them."""

    def set(self, messages: Sequence[Message]) -> list[int | OSError]:
        """Have KVM send these messages, by one change of its table; for each its GSI, or why it
        can't be one. Raises KvmError, with nothing changed."""
        ...


class MessageRoutes:
    """KVM's routing table: the board's interrupt lines, and a GSI for each message in use.

    It has one entry for each vector that was ever in use, however often the guest changes them.
    """

    def __init__(self, vm: Vm, pins: Sequence[tuple[int, int, int]], first_gsi: int) -> None:
        """`pins` are the lines as (gsi, irqchip, pin); messages have GSIs from `first_gsi` on."""
        self._vm = vm
        self._pins = pins
        self._first_gsi = first_gsi
        self._messages: dict[int, MessageRoute] = {}
        # Held while KVM is waited for: by vCPUs alone.
        self._lock = Lock()

    def set(self, messages: Sequence[Message]) -> list[int | OSError]:
        """See Routes.set. Raises KvmError, unchanged."""
        with self._lock:
            table = dict(self._messages)
            gsis: list[int | OSError] = []
            for gsi, address, data in messages:
                number = self._first_gsi + len(table) if gsi is None else gsi
                table[number] = MessageRoute(number, address, data)
                gsis.append(number)
            self._vm.set_gsi_routing(self._pins, list(table.values()))
            self._messages = table
            return gsis


class MsixMessages:
    """The messages of one function by vector, each with an eventfd from its first use on."""

    def __init__(self, vm: Vm, routes: Routes) -> None:
        self._vm = vm
        self._routes = routes
        self._eventfds: dict[int, int] = {}
        self._gsis: dict[int, int] = {}
        self._told = False
        self._opened = ExitStack()
        self.close = self._opened.close

    def route(self, messages: Mapping[int, tuple[int, int]]) -> None:
        """From now on the vectors have these messages; the old ones, where KVM has no room."""
        wanted = [Message(self._gsis.get(vector), *message) for vector, message in messages.items()]
        try:
            gsis = self._routes.set(wanted)
        except OSError as error:  # KvmError is one
            gsis = [error] * len(wanted)
        for vector, gsi in zip(messages, gsis, strict=True):
            try:
                if isinstance(gsi, OSError):
                    raise gsi
                self._gsis[vector] = gsi
                if vector not in self._eventfds:
                    self._eventfds[vector] = self._open(gsi)
            except OSError as error:
                if not self._told:  # the guest may make it happen as often as it likes
                    why = in_words(error)
                    tell(f"interrupt message {vector} of a PCI function is lost: {why}")
                self._told = True

    def _open(self, gsi: int) -> int:
        """An eventfd that sends the GSI's message. Raises OSError."""
        with ExitStack() as opened:
            eventfd = open_eventfd(opened)
            self._vm.irqfd(eventfd, gsi)
            self._opened.push(opened.pop_all())
        return eventfd

    def gsi(self, vector: int) -> int | None:
        """The GSI by which KVM sends the vector's message, once it has one."""
        return self._gsis.get(vector)

    def signal(self, vector: int) -> None:
        """Send the vector's message; dropped while it has none."""
        eventfd = self._eventfds.get(vector)
        if eventfd is not None:
            os.eventfd_write(eventfd, 1)
