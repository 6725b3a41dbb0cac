"""A guest that does what it is told: read, write, fill or compare memory at an address.

For tests of memory and conversions, and measurements. Each architecture has its own code for the
verbs; here is what they have in common.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator

from kvm_bindings import KvmError, Vcpu
from kvm_bindings.exits import Exit, InterruptedExit
from vmm.core.lean_typing import Protocol
from vmm.core.ranges import PAGE_SIZE
from vmm.exits.run_loop import KICK_SIGNAL

CODE_SIZE = 4 << 20
"""Code and tables lie in the first 4 MiB, in a memslot of their own that is always shared."""

WORD = 8
WORDS_A_PAGE = PAGE_SIZE // WORD


class GuestStopped(Exception):
    """The guest did not get to the end of a verb; `exit` is what came instead."""

    def __init__(self, exit: Exit) -> None:
        super().__init__(f"the guest stopped with {exit}")
        self.exit = exit


class Gate:
    """Keeps vCPUs out of their guest while memslots are being replaced."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A vCPU is in the guest; waits while the gate is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._shut)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """No vCPU is in the guest. For a thread whose own vCPU isn't either."""
        with self._changed:
            self._shut += 1
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._shut -= 1
                self._changed.notify_all()


class GuestCpu(Protocol):
    """One vCPU at the test's command. Addresses are guest-physical, with the C-bit if any.

    Every verb raises GuestStopped, and may be repeated then.
    """

    @property
    def vcpu(self) -> Vcpu:
        """For what a test does to it besides."""
        ...

    def read(self, address: int) -> int: ...
    def write(self, address: int, word: int) -> None: ...
    def fill(self, address: int, size: int, word: int) -> None: ...
    def holds(self, address: int, size: int, word: int) -> bool: ...
    def interrupt(self) -> None: ...


class KvmGuestCpu(ABC):
    """The part of a GuestCpu on a real KVM that every architecture shares: running a verb.

    One thread at a time may use it; any may interrupt it.
    """

    def __init__(self, vcpu: Vcpu, gate: Gate) -> None:
        self.vcpu = vcpu
        self._gate = gate
        self._interrupted = False
        self._thread: int | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def is_done(self, exit: Exit) -> bool:
        """Whether the exit is the one that ends a verb."""

    def interrupt(self) -> None:
        """End the verb under way, and every later one, with GuestStopped. From any thread."""
        self._interrupted = True
        # The flag catches a vCPU on its way into KVM_RUN, the signal one that is inside.
        self.vcpu.immediate_exit = True
        with self._lock:
            if self._thread is not None:
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    def run_verb(self) -> None:
        """Run the vCPU, whose registers are set, to the verb's end. Raises GuestStopped."""
        with self._lock:
            self._thread = threading.get_ident()
        try:
            with self._gate.running():
                exit = self.vcpu.run()
                while isinstance(exit, InterruptedExit) and not self._interrupted:
                    exit = self.vcpu.run()
        finally:
            with self._lock:
                self._thread = None
        if not self.is_done(exit):
            self._complete()
            raise GuestStopped(exit)

    def _complete(self) -> None:
        """Let KVM finish the instruction that exited (MMIO): else it would do so after the next
        verb's registers have been set, and overwrite them."""
        self.vcpu.immediate_exit = True
        with contextlib.suppress(KvmError):
            self.vcpu.run()
        self.vcpu.immediate_exit = self._interrupted
