"""The runner of micro-guests: a few instructions of an architecture's, a vCPU, a watchdog."""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from kvm_bindings import Vcpu, Vm, fdops
from kvm_bindings.exits import Exit, InterruptedExit
from vmm.core.lean_typing import Enum, Self
from vmm.exits.run_loop import KICK_SIGNAL, install_kick_handler

WATCHDOG_SECONDS = 1.0

RAM_SIZE = 2 << 20
"""RAM: the micro-guest's code and tables."""
AREA_SIZE = 2 << 20
"""Bytes at `area_gpa`, which a guest reaches and which have no memslot: a probe puts there what
it tests."""
WORD_AT = 8
"""Where in the area EXCHANGE reads and writes."""


class Verb(Enum):
    """What the code of a micro-guest does; each ends with an exit that `MicroGuest.word` knows."""

    DONE = "done"
    """Nothing else. Then the vCPU is not to be run again."""
    DONE_FOR_EVER = "done for ever"
    """Nothing else, again at each run."""
    EXCHANGE = "exchange"
    """Read the 8-byte word at `area_gpa` + WORD_AT, write the guest's word there, say the low 32
    bits of what was read; again at each run."""


class MicroGuest(ABC):
    """A VM with one vCPU and RAM in a memfd. A context manager; main thread only."""

    area_gpa: int

    def __init__(self, opened: ExitStack, vm: Vm, vcpu: Vcpu, seconds: float | None) -> None:
        """`opened` closes the guest and is taken over; `seconds` are the watchdog's."""
        self.vm = vm
        self.vcpu = vcpu
        self._opened = opened
        self._seconds = WATCHDOG_SECONDS if seconds is None else seconds
        self._barked = False

    @abstractmethod
    def word(self, exit: Exit) -> int | None:
        """What the guest said when it came to its verb's end; None for every other exit."""

    def run(self) -> Exit:
        """To the next exit; InterruptedExit when the guest makes none until the watchdog barks."""
        with self.watched():
            return self.next_exit()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The watchdog watches over every `next_exit` in the block together."""
        install_kick_handler()
        runner = threading.get_ident()

        def bark() -> None:
            self._barked = True
            # The flag catches a vCPU on its way into KVM_RUN, the signal one that is inside.
            self.vcpu.immediate_exit = True
            signal.pthread_kill(runner, KICK_SIGNAL)

        watchdog = threading.Timer(self._seconds, bark)
        try:
            watchdog.start()  # Ctrl-C may come while it waits for the thread
            yield
        finally:
            watchdog.cancel()
            if watchdog.ident is not None:
                watchdog.join()

    def next_exit(self) -> Exit:
        """KVM_RUN, repeated for signals other than the watchdog's."""
        exit = self.vcpu.run()
        while isinstance(exit, InterruptedExit) and not self._barked:
            exit = self.vcpu.run()
        return exit

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def seen(exit: Exit) -> str:
    """An exit in a word or two, for evidence."""
    if isinstance(exit, InterruptedExit):
        return f"no exit within {WATCHDOG_SECONDS:g} s"
    return type(exit).__name__


def memory_file(opened: ExitStack, size: int) -> int:
    """A memfd of `size` bytes, closed with `opened`."""
    memfd = os.memfd_create("pyvmm-probe", os.MFD_CLOEXEC)
    opened.callback(os.close, memfd)
    os.ftruncate(memfd, size)
    return memfd


def mapped(opened: ExitStack, fd: int, size: int) -> int:
    """The address of a mapping of `fd`, undone with `opened`. Raises KvmError."""
    address = fdops.map_shared(fd, size)
    opened.callback(fdops.unmap, address, size)
    return address


def open_eventfd(opened: ExitStack) -> int:
    """An eventfd that nobody waits for, closed with `opened`."""
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    opened.callback(os.close, eventfd)
    return eventfd


def was_signalled(eventfd: int) -> bool:
    """Whether somebody has written to it since the last look."""
    try:
        return os.eventfd_read(eventfd) > 0
    except BlockingIOError:
        return False
