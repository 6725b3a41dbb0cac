"""A vCPU's thread: run, dispatch, repeat, until somebody stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from kvm_bindings import KvmError, Vcpu
from kvm_bindings.exits import Exit, InterruptedExit
from kvm_bindings.vcpu import interrupt_by
from vmm.core.lean_signal import signal
from vmm.core.lean_typing import TYPE_CHECKING, Any, Protocol
from vmm.core.thread_signals import leave_signals_to_the_main_thread
from vmm.exits.outcome import INTERNAL_ERROR, KILLED, Outcome
from vmm.policy import PolicyKill

if TYPE_CHECKING:
    from vmm.exits.handlers import ExitHandlers

KICK_SIGNAL = signal.SIGRTMIN
"""Interrupts KVM_RUN; its handler does nothing."""
MOST_TO_SETTLE = 64
"""How many exits in a row a vCPU completes that is to stand still for a debugger."""


def install_kick_handler() -> None:
    """Give KICK_SIGNAL a handler, so that it interrupts instead of killing; from any thread, any
    number of times."""
    interrupt_by(KICK_SIGNAL)


class Gate(Protocol):
    """Where a vCPU that was summoned waits before it enters the guest again (VcpuGroup)."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Re-entrant: a signal handler on the main thread may stop vCPUs at any moment."""

    @property
    def at_start(self) -> Callable[[], None] | None:
        """What a vCPU's thread does first."""

    settles: bool
    """Whether vCPUs let KVM complete their last exit before they wait."""

    def has_left(self) -> None: ...
    def admit(self, runner: VcpuRunner) -> bool: ...


class VcpuRunner:
    """Runs one vCPU on a thread of its own."""

    def __init__(
        self, vcpu: Vcpu, handlers: ExitHandlers, stop: Callable[[Outcome], None], gate: Gate
    ) -> None:
        self._vcpu = vcpu
        self._handlers = handlers
        self._stop = stop
        self._gate = gate
        self.stopping = False
        self.in_guest = False
        """Whether KVM_RUN is under way, or will be unless the vCPU finds itself summoned."""
        self.waits = False
        """Whether it waits at the gate; with `settles`, no exit is left to complete then, unless
        it `owes`."""
        self.owes = False
        self._summoned = False
        self._looping = False
        # A daemon: a policy's hook that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"vcpu{vcpu.index}", daemon=True)
        self.error: BaseException | None = None
        """What a handler raised, for the main thread to raise again."""
        self.exit_counts: dict[str, int] = {}

    def start(self) -> None:
        self._looping = True
        self._thread.start()

    def stop(self) -> None:
        """Make the vCPU leave the guest and its thread end; from any thread, any number of
        times."""
        self.stopping = True
        self._summoned = True
        # The flag catches a vCPU on its way into KVM_RUN, the signal one that is inside. It is
        # sent to one in a handler as well: that may hang in a write.
        self._vcpu.immediate_exit = True
        self._kick()

    def summon(self) -> None:
        """Make the vCPU leave the guest and go to the gate; the gate's lock held."""
        self._summoned = True
        self._vcpu.immediate_exit = True
        if self.in_guest:
            self._kick()

    @property
    def is_looping(self) -> bool:
        """Whether its thread has been started, and has not come to its end."""
        return self._looping

    @property
    def oldest_coalesced_write(self) -> int | None:
        """The place in the VM's ring of the write that has waited longest; None if none waits."""
        return self._vcpu.oldest_coalesced_write

    def carry_out_coalesced_writes(self) -> None:
        """Have the vCPU leave the guest for a moment and do it, on its own thread: a console's
        reader may keep that waiting."""
        self._kick()

    def tell_stopped(self) -> None:
        """Have the guest know that it was stopped for a while; the vCPU is parked."""
        if self._looping:
            self._handlers.tell_stopped(self._vcpu)

    def may_enter(self) -> bool:
        """The gate is open (its lock held): whether the vCPU may enter the guest again."""
        # First both flags, then the question: `stop` does it the other way round, without lock.
        self._summoned = False
        self._vcpu.immediate_exit = False
        return not self.stopping

    def _settling(self, exit: object, tried: int) -> bool:
        """Whether to enter KVM_RUN, which returns at once, for the sake of what `exit` began: the
        result of an IN, perhaps. String I/O may take as many exits as its guest likes."""
        settles = self._gate.settles and not self.stopping
        self.owes = settles and exit is not None and exit.__class__ is not InterruptedExit
        return self.owes and tried < MOST_TO_SETTLE

    def _kick(self) -> None:
        with self._gate.lock:  # a signal may only go to a thread that lives
            if self._looping and self._thread.ident is not None:
                signal.pthread_kill(self._thread.ident, KICK_SIGNAL)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end, `timeout` seconds at most; whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        leave_signals_to_the_main_thread(KICK_SIGNAL)
        self._loop()

    def _loop(self) -> None:
        vcpu, table, counts = self._vcpu, self._handlers.table, self.exit_counts
        run, coalesced = vcpu.run, self._handlers.coalesced
        gate = self._gate
        exit: Exit | None = None
        settled = 0
        try:
            if gate.at_start is not None:
                gate.at_start()
            while True:
                # Said before looking, as who summons looks after saying so: one sees the other.
                self.in_guest = True
                if self._summoned:
                    if not self._settling(exit, settled):
                        self.in_guest = False
                        if not gate.admit(self):
                            return
                        settled = 0
                        continue
                    settled += 1
                exit = run()
                self.in_guest = False
                if self._summoned:
                    gate.has_left()
                if vcpu.has_coalesced_writes:
                    coalesced(vcpu)
                if exit.__class__ is InterruptedExit:
                    continue
                name, handle = table[exit.__class__]
                counts[name] = counts.get(name, 0) + 1
                handle(vcpu, exit)
        except PolicyKill as kill:
            # Before the exit completes: the guest gets no answer and runs no further.
            self._stop(Outcome(KILLED, str(kill)))
        except KvmError as error:
            self._stop(Outcome(INTERNAL_ERROR, f"vCPU {vcpu.index}: {error}"))
        except BaseException as error:
            self.error = error
            self._stop(Outcome(INTERNAL_ERROR, f"vCPU {vcpu.index}: {error!r}"))
        finally:
            with gate.lock:
                self._looping = False
                self.in_guest = False
            gate.has_left()
