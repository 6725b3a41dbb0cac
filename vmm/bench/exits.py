"""(c) Exits: pyvmm's run loop, from KVM_RUN to the device and back, against a C loop of KVM_RUN."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from kvm_bindings import System, floors, ioctls
from vmm.arch import architecture
from vmm.bench.series import Series, interleaved
from vmm.exits.run_loop import VcpuRunner
from vmm.host.probes.micro_guest import Verb


class _Ending:
    """A device that ends the loop after so many writes."""

    def __init__(self) -> None:
        self.left = 0
        self.end: Callable[[], None] = lambda: None

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.left -= 1
        if not self.left:
            self.end()


class _OpenGate:
    """Nobody is ever parked; a runner that is to stop is told so."""

    lock: AbstractContextManager[Any] = nullcontext()
    at_start: Callable[[], None] | None = None
    settles = False

    def has_left(self) -> None:
        """Nobody waits for it."""

    def admit(self, runner: VcpuRunner) -> bool:
        return runner.may_enter()


def measure(system: System, rounds: int, exits: int) -> Iterator[Series]:
    """Guests in user mode where the host interprets kernel mode: the exit itself is what counts."""
    arch = architecture()
    with arch.micro_guest(system, Verb.DONE_FOR_EVER, seconds=600.0) as guest:
        device = _Ending()
        handlers = arch.handlers_of_done(device)

        def ours() -> float:
            runner = VcpuRunner(guest.vcpu, handlers, lambda outcome: None, _OpenGate())
            device.left, device.end = exits, lambda: _finish(runner)
            started = time.perf_counter_ns()
            runner._loop()
            elapsed = time.perf_counter_ns() - started
            if runner.error is not None:
                raise runner.error
            return elapsed / exits / 1000

        def bindings() -> float:
            run = guest.vcpu.run
            started = time.perf_counter_ns()
            for _ in range(exits):
                run()
            return (time.perf_counter_ns() - started) / exits / 1000

        def bare() -> float:
            return floors.ioctl_ns(guest.vcpu.fd, ioctls.KVM_RUN, exits) / 1000

        subjects = {"C loop": bare, "Vcpu.run": bindings, "run loop": ours}
        yield from interleaved("exits", "OUT to a device", "us", subjects, rounds)


def _finish(runner: VcpuRunner) -> None:
    runner.stopping = True
    runner._summoned = True
