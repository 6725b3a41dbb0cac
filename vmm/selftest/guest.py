"""A guest that does what it is told: read, write, fill or compare memory at an address.

Its code is a few instructions for each verb, run at CPL 3, where no host interprets it. The
registers carry the arguments in and the result out, and a port write ends each verb.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from kvm_bindings import KvmError
from kvm_bindings.exits import Exit, InterruptedExit, IoExit
from kvm_bindings.x86_64 import Vcpu
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.page_tables import payload_tables
from vmm.arch.x86_64.registers import payload_entry
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.exits.run_loop import KICK_SIGNAL

CODE_GPA = layout.PAYLOAD_GPA
CODE_SIZE = 4 << 20
"""Code and tables lie in the first 4 MiB, in a memslot of their own that is always shared."""

DONE_PORT = 0x10
WORD = 8
WORDS_A_PAGE = PAGE_SIZE // WORD

_DONE = b"\xe6\x10"  # out 0x10, al
# Each verb's address is in rdi.
_READ = b"\x48\x8b\x07" + _DONE  # mov rax, [rdi]
_WRITE = b"\x48\x89\x37" + _DONE  # mov [rdi], rsi
_FILL = b"\xf3\x48\xab" + _DONE  # rep stosq: rcx words of rax
_COMPARE = b"\xf3\x48\xaf" + _DONE  # repe scasq: rcx words with rax
_STRIDE = 16
_VERBS = (_READ, _WRITE, _FILL, _COMPARE)
_READ_AT, _WRITE_AT, _FILL_AT, _COMPARE_AT = (CODE_GPA + _STRIDE * n for n in range(len(_VERBS)))
_ZERO_FLAG = 1 << 6


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

    vcpu: Vcpu

    def read(self, address: int) -> int: ...
    def write(self, address: int, word: int) -> None: ...
    def fill(self, address: int, size: int, word: int) -> None: ...
    def holds(self, address: int, size: int, word: int) -> bool: ...
    def interrupt(self) -> None: ...


def guest_code(ram: Sequence[Range], c_mask: int) -> list[tuple[int, bytes]]:
    """What the first CODE_SIZE bytes of guest memory have to hold, as (GPA, bytes)."""
    tables = payload_tables([Range(0, CODE_SIZE), *ram], c_mask)
    state = payload_entry(CODE_GPA, tables.cr3)
    verbs = [(CODE_GPA + _STRIDE * number, verb) for number, verb in enumerate(_VERBS)]
    return [*tables.writes, *state.writes, *verbs]


class KvmGuestCpu:
    """A GuestCpu on a real KVM. One thread at a time may use it; any may interrupt it."""

    def __init__(self, vcpu: Vcpu, supported_cpuid: Sequence[tuple[int, ...]], gate: Gate) -> None:
        """Sets the vCPU's registers up; guest_code is in memory by the time of the first verb."""
        self.vcpu = vcpu
        self._gate = gate
        state = payload_entry(CODE_GPA, layout.PAGE_TABLES_GPA)
        # CPUID first: KVM refuses EFER.LME to a vCPU that doesn't have long mode.
        vcpu.set_cpuid2(supported_cpuid)  # type: ignore[arg-type]  # tuples of seven
        vcpu.update_sregs(state.sregs)  # type: ignore[arg-type]  # a TypedDict
        self._registers = state.regs
        self._interrupted = False
        self._thread: int | None = None
        self._lock = threading.Lock()

    def read(self, address: int) -> int:
        self._do(_READ_AT, rdi=address)
        return self.vcpu.get_regs()["rax"]

    def write(self, address: int, word: int) -> None:
        self._do(_WRITE_AT, rdi=address, rsi=word)

    def fill(self, address: int, size: int, word: int) -> None:
        self._do(_FILL_AT, rdi=address, rcx=size // WORD, rax=word)

    def holds(self, address: int, size: int, word: int) -> bool:
        self._do(_COMPARE_AT, rdi=address, rcx=size // WORD, rax=word)
        registers = self.vcpu.get_regs()
        return registers["rcx"] == 0 and bool(registers["rflags"] & _ZERO_FLAG)

    def interrupt(self) -> None:
        """End the verb under way, and every later one, with GuestStopped. From any thread."""
        self._interrupted = True
        # The flag catches a vCPU on its way into KVM_RUN, the signal one that is inside.
        self.vcpu.immediate_exit = True
        with self._lock:
            if self._thread is not None:
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    def _do(self, verb: int, **registers: int) -> None:
        self.vcpu.set_regs({**self._registers, **registers, "rip": verb})
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
        if not isinstance(exit, IoExit) or exit.port != DONE_PORT:
            self._complete()
            raise GuestStopped(exit)

    def _complete(self) -> None:
        """Let KVM finish the instruction that exited (MMIO): else it would do so after the next
        verb's registers have been set, and overwrite them."""
        self.vcpu.immediate_exit = True
        with contextlib.suppress(KvmError):
            self.vcpu.run()
        self.vcpu.immediate_exit = self._interrupted
