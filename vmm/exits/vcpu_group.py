"""All vCPUs of a machine: started and stopped together, and kept out of the guest on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from kvm_bindings import Vcpu
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.exits.outcome import Outcome
from vmm.exits.run_loop import VcpuRunner

if TYPE_CHECKING:
    from vmm.exits.handlers import ExitHandlers


class VcpuGroup:
    """Owns the runners. `parked` and `pause` hold every vCPU at a gate before its KVM_RUN.

    A vCPU is parked when its thread is not inside KVM_RUN and cannot enter it: at the gate, in a
    handler (also one that waits for a lock), or ended. Its guest runs nothing and touches no
    memory. What an exit still owes the guest (the result of an IN) is delivered by the next
    KVM_RUN, so that registers read while parked may lack it.
    """

    def __init__(self) -> None:
        self.runners: list[VcpuRunner] = []
        # Re-entrant, because a signal handler on the main thread may call `stop` in the middle of
        # anything. Nobody holds it while waiting for something else.
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._holds = 0
        self._paused = False
        self.at_start: Callable[[], None] | None = None
        """What each vCPU's thread does first."""
        self._frozen = False
        self._staying: frozenset[VcpuRunner] = frozenset()
        self.settles = False

    def add(
        self, vcpu: Vcpu, handlers: ExitHandlers, stop: Callable[[Outcome], None]
    ) -> VcpuRunner:
        """A runner for `vcpu`, to be started with the others."""
        runner = VcpuRunner(vcpu, handlers, stop, self)
        self.runners.append(runner)
        return runner

    def start(self) -> None:
        """Start the threads; vCPUs of a paused group wait at the gate."""
        for runner in self.runners:
            runner.start()

    def stop(self) -> None:
        """Make every vCPU leave the guest and its thread end, whether parked or not.

        From any thread or signal handler, any number of times.
        """
        for runner in self.runners:
            runner.stop()
        with self._changed:
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """Wait for all threads' ends, `timeout` seconds at most; whether all have ended."""
        deadline = time.monotonic() + timeout
        return all(runner.join(max(deadline - time.monotonic(), 0)) for runner in self.runners)

    # -- parking ------------------------------------------------------------------------------

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Within the block no vCPU is in the guest.

        From any thread, also a vCPU's own in a handler. Blocks may overlap and nest: the vCPUs go
        on at the end of the last. It says nothing about who else has them parked: what excludes
        others is the caller's own lock, which handlers may be waiting for.
        """
        self._hold()
        try:
            yield
        finally:
            self._release()

    def pause(self) -> None:
        """Park all vCPUs until `resume`; again: nothing. Returns when they are parked."""
        with self.lock:
            if self._paused:
                return
            self._paused = True
        self._hold()

    def resume(self) -> None:
        """Let the vCPUs go on after `pause`; nothing where they weren't paused."""
        with self.lock:
            if not self._paused:
                return
            self._paused = False
        try:
            self._tell_stopped()
        finally:
            self._release()

    # -- for a debugger -----------------------------------------------------------------------

    def freeze(self) -> None:
        """Have all vCPUs stand still until `thaw`; again: nothing. Waits for nobody, so that a
        vCPU's own thread may call it in a handler.

        From now on vCPUs at the gate have no exit left to complete, but for those that `owes`.
        """
        with self._changed:
            self.settles = True
            self._staying = frozenset()
            if self._frozen:
                return
            self._frozen = True
            self._holds += 1
            for runner in self.runners:
                runner.summon()

    def wait_until_still(self, timeout: float) -> bool:
        """Wait (seconds) for all vCPUs to be at the gate, or ended, after `freeze`; False where
        one is not: it is in a handler, which may wait for somebody. None is in the guest."""
        with self._changed:
            self._changed.wait_for(lambda: not any(r.in_guest for r in self.runners))
            return self._changed.wait_for(lambda: all(map(_is_still, self.runners)), timeout)

    def is_still(self, runner: VcpuRunner) -> bool:
        """Whether it has nothing more to do before its next KVM_RUN, and will not enter it."""
        with self.lock:
            return self._frozen and _is_still(runner) and not runner.owes

    def thaw(self, staying: Iterable[VcpuRunner] = ()) -> None:
        """Let the vCPUs go on after `freeze`, all but `staying`; nothing where none stand still."""
        with self.lock:
            if not self._frozen:
                return
        try:
            self._tell_stopped()
        finally:
            with self._changed:
                self._frozen = False
                self._staying = frozenset(staying)
                self._release()

    @property
    def frozen(self) -> bool:
        """Whether a debugger has all vCPUs stand still."""
        return self._frozen

    def process_continued(self) -> None:
        """The whole process was stopped by a signal, and its vCPUs with it."""
        with self.parked():
            self._tell_stopped()

    def _tell_stopped(self) -> None:
        for runner in self.runners:
            runner.tell_stopped()

    @property
    def paused(self) -> bool:
        """Whether `pause` has been called last, and not `resume`."""
        return self._paused

    def _hold(self) -> None:
        with self._changed:
            self._holds += 1
            for runner in self.runners:
                runner.summon()
            try:
                self._changed.wait_for(lambda: not any(runner.in_guest for runner in self.runners))
            except BaseException:
                self._release()
                raise

    def _release(self) -> None:
        with self._changed:
            self._holds -= 1
            if not self._holds:
                self._changed.notify_all()

    # -- the gate, on vCPU threads ------------------------------------------------------------

    def has_left(self) -> None:
        """A vCPU that was summoned is out of the guest."""
        with self._changed:
            self._changed.notify_all()

    def admit(self, runner: VcpuRunner) -> bool:
        """Wait for the gate to open; False when the vCPU is to end instead."""
        with self._changed:
            self._changed.notify_all()
            runner.waits = True
            self._changed.wait_for(
                lambda: runner.stopping or not (self._holds or runner in self._staying)
            )
            runner.waits = False
            return runner.may_enter()


def _is_still(runner: VcpuRunner) -> bool:
    return runner.waits or not runner.is_looping
