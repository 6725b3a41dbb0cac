"""A vCPU's thread: run, dispatch, repeat, until somebody stops it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from kvm_bindings import KvmError, Vcpu
from kvm_bindings.exits import InterruptedExit
from vmm.exits.handlers import ExitHandlers
from vmm.exits.outcome import INTERNAL_ERROR, Outcome

KICK_SIGNAL = signal.SIGRTMIN
"""Interrupts KVM_RUN; its handler does nothing."""


def install_kick_handler() -> None:
    """Give KICK_SIGNAL a handler (main thread only), so that it interrupts instead of killing."""
    signal.signal(KICK_SIGNAL, lambda number, frame: None)


class VcpuRunner:
    """Runs one vCPU on a thread of its own."""

    def __init__(self, vcpu: Vcpu, handlers: ExitHandlers, stop: Callable[[Outcome], None]) -> None:
        self._vcpu = vcpu
        self._handlers = handlers
        self._stop = stop
        self._stopping = False
        # A signal may only go to a thread that lives. Re-entrant, because a signal handler on
        # the main thread may call `stop` while that is in `stop`.
        self._alive = threading.RLock()
        self._looping = False
        # A daemon: a policy's hook that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._loop, name=f"vcpu{vcpu.index}", daemon=True)
        self.error: BaseException | None = None
        """What a handler raised, for the main thread to raise again."""
        self.exit_counts: dict[str, int] = {}

    def start(self) -> None:
        self._looping = True
        self._thread.start()

    def stop(self) -> None:
        """Make the vCPU leave the guest and its thread end; from any thread, any number of
        times."""
        self._stopping = True
        # The flag catches a vCPU on its way into KVM_RUN, the signal one that is inside.
        self._vcpu.immediate_exit = True
        with self._alive:
            if self._looping and self._thread.ident is not None:
                signal.pthread_kill(self._thread.ident, KICK_SIGNAL)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end, `timeout` seconds at most; whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        vcpu, table, counts = self._vcpu, self._handlers.table, self.exit_counts
        run, coalesced = vcpu.run, self._handlers.coalesced
        try:
            while not self._stopping:
                exit = run()
                if exit.__class__ is InterruptedExit:
                    continue
                if vcpu.has_coalesced_writes:
                    coalesced(vcpu)
                name, handle = table[exit.__class__]
                counts[name] = counts.get(name, 0) + 1
                handle(vcpu, exit)
        except KvmError as error:
            self._stop(Outcome(INTERNAL_ERROR, f"vCPU {vcpu.index}: {error}"))
        except BaseException as error:
            self.error = error
            self._stop(Outcome(INTERNAL_ERROR, f"vCPU {vcpu.index}: {error!r}"))
        finally:
            with self._alive:
                self._looping = False
