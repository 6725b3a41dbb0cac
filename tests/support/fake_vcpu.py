"""A vCPU whose exits are written by hand and whose answers are recorded, and the rig around it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvm_bindings.exits import Exit, InterruptedExit
from tests.support.x86 import exit_handlers
from vmm.arch.x86_64.msrs import MsrTable
from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.ranges import Range
from vmm.devices.bus import MemoryBus, PortBus
from vmm.exits.outcome import Outcome
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory
from vmm.policy import Policy

RAM = 1 << 20
PRIVATE_START = 0x8_0000
"""The rig's RAM: shared below, private from here to the end."""

Step = Exit | BaseException | Callable[[], Exit]


class FakeVcpu:
    """Answers like kvm_bindings.Vcpu. `run` plays `steps` (an exit, an exception to raise, or a
    function), then waits for `immediate_exit` as a guest that computes for ever does."""

    def __init__(self, steps: Iterable[Step] = (), index: int = 0) -> None:
        self.index = index
        self.io: list[bytes] = []
        self.mmio: list[bytes] = []
        self.hypercalls: list[int] = []
        self.msrs: list[tuple[int | None, bool]] = []
        self.registers = {"rip": 0x1234}
        self.told_stopped = 0
        self.idle = threading.Event()
        """Set once all steps are played and `run` waits."""
        self.ring: list[Exit] = []
        """Writes that KVM keeps back."""
        self._steps = list(steps)
        self._kicked = threading.Event()
        self._ignored = 0

    def run(self) -> Exit:
        if self._kicked.is_set():
            self._ignored += 1
            if self._ignored > 100:
                raise AssertionError("the loop goes on though it was told to stop")
            return InterruptedExit(errno.EINTR)
        if not self._steps:
            self.idle.set()
            self._kicked.wait()
            return InterruptedExit(errno.EINTR)
        step = self._steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step() if callable(step) else step

    @property
    def has_coalesced_writes(self) -> bool:
        return bool(self.ring)

    @property
    def oldest_coalesced_write(self) -> int | None:
        return 0 if self.ring else None

    def coalesced_writes(self) -> Iterator[Exit]:
        while self.ring:
            yield self.ring[0]
            del self.ring[0]

    @property
    def immediate_exit(self) -> bool:
        return self._kicked.is_set()

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        if value:
            self._kicked.set()
        else:
            self._kicked.clear()

    def kvmclock_ctrl(self) -> bool:
        """What a guest is told that was stopped; must not meet a KVM_RUN."""
        self.told_stopped += 1
        return True

    def answer_io(self, data: bytes) -> None:
        self.io.append(data)

    def answer_mmio(self, data: bytes) -> None:
        self.mmio.append(data)

    def answer_hypercall(self, result: int) -> None:
        self.hypercalls.append(result)

    def answer_msr(self, value: int | None, *, known: bool) -> None:
        self.msrs.append((value, known))

    def get_regs(self) -> dict[str, int]:
        return self.registers


@dataclass
class RecordingDevice:
    """A port device that notes what it is asked; reads answer the numbers given, in turn."""

    answers: list[int] = field(default_factory=list)
    reads: list[tuple[int, int]] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answers.pop(0)

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


@dataclass
class StreamDevice(RecordingDevice):
    """One that also takes whole strings for its first port."""

    strings: list[bytes] = field(default_factory=list)

    def write_bytes(self, data: bytes) -> None:
        self.strings.append(data)


class Rig:
    """Handlers over real guest memory, doorbell and converter; close it."""

    def __init__(self, *, private: bool = True, policy: Policy | None = None) -> None:
        backing = MemfdBacking(RAM) if private else None
        areas = [Range(PRIVATE_START, RAM - PRIVATE_START)] if private else []
        self.memory = GuestMemory([Range(0, RAM)], MemfdBacking(RAM), backing, areas)
        self.converter = Converter(self.memory, CbitScheme(38), policy or Policy())
        self.ports = PortBus()
        self.registers = MemoryBus()
        self.msrs = MsrTable(c_bit=private)
        self.outcomes: list[Outcome] = []
        self.handlers = exit_handlers(
            self.memory,
            self.converter,
            self.outcomes.append,
            ports=self.ports,
            registers=self.registers,
            msrs=self.msrs,
            private=private,
        )

    def handle(self, exit: Any, vcpu: FakeVcpu | None = None) -> FakeVcpu:
        """Dispatch one exit as the run loop does; the vCPU with its recorded answers."""
        vcpu = vcpu or FakeVcpu()
        _, handler = self.handlers.table[type(exit)]
        handler(vcpu, exit)
        return vcpu

    def close(self) -> None:
        self.memory.close()
