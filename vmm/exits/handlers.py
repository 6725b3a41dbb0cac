"""One handler per exit class: what the guest asked for, handed to the room that knows.

Here is what every architecture has. An architecture's own exits (port I/O, MSRs, hypercalls) are
handled by its subclass. Handlers can be called with hand-made exits and anything that answers
like a vCPU.
"""

from __future__ import annotations

import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from kvm_bindings import exits
from vmm.core.events import ConversionRequest, Kind
from vmm.core.lean_typing import Any, Protocol
from vmm.devices.bus import Banked, PortDevice
from vmm.exits.outcome import FAILED, INTERNAL_ERROR, PANIC, POWEROFF, RESET, Outcome

_SYSTEM_EVENTS = {1: "shutdown", 2: "reset", 3: "crash"}


class AnsweringVcpu(Protocol):
    """The part of kvm_bindings.Vcpu that handlers use."""

    index: int

    def answer_mmio(self, data: bytes) -> None: ...


class Registers(Protocol):
    """A memory bus: the device at a GPA with the address' offset in it, or None."""

    def find(self, gpa: int, /) -> tuple[PortDevice, int] | None: ...


class Conversions(Protocol):
    """The part of the converter that handlers use; both answer 0 or a negative errno."""

    def convert(self, request: ConversionRequest, /) -> int: ...
    def fault(self, kind: Kind, gpa: int, size: int, vcpu: int, /) -> int: ...


Stop = Callable[[Outcome], None]
"""Ends the run; the first outcome counts."""
Handler = Callable[[Any, Any], None]
Table = dict[type[Any], tuple[str, Handler]]
"""What is called for each class of exit, and the name under which it is counted."""


def bank_of(device: PortDevice, vcpu: int) -> PortDevice:
    """What answers that vCPU at a device's place: its bank, where the device has such."""
    return device.banks[vcpu] if device.__class__ is Banked else device


class ExitHandlers(ABC):
    """Dispatches exits; shared by all vCPUs of a machine, called on their threads."""

    def __init__(self, registers: Registers, converter: Conversions, stop: Stop) -> None:
        """`registers` are those in memory; `stop` ends the run."""
        self._registers = registers
        self._converter = converter
        self._stop = stop
        self._ring_lock = threading.Lock()
        self.table: Table = {
            exits.MmioExit: ("mmio", self.mmio),
            exits.MemoryFaultExit: ("memory_fault", self.memory_fault),
            exits.SystemEventExit: ("system_event", self.system_event),
            exits.FailEntryExit: ("fail_entry", self.fail_entry),
            exits.InternalErrorExit: ("internal_error", self.internal_error),
            exits.DebugExit: ("debug", self.debug),
            exits.UnknownExit: ("unknown", self.unknown),
        }

    # -- what an architecture adds ------------------------------------------------------------

    @abstractmethod
    def where(self, vcpu: Any) -> str:
        """The vCPU's program counter, for a sentence: "RIP 0x1000"."""

    def tell_stopped(self, vcpu: Any) -> None:
        """Have the guest know that it was stopped for a while, where there is a way to."""
        del vcpu

    def coalesced_write(self, vcpu: Any, exit: Any) -> None:
        """Carry out one write that KVM kept back; it is counted nowhere, as it was no exit."""
        self.mmio(vcpu, exit)

    def port_counts(self) -> dict[int, int]:
        """Exits per I/O port, for the report; empty where there are no ports."""
        return {}

    def not_emulated(self, exit: exits.InternalErrorExit, where: str) -> str:
        """The sentence for an instruction that KVM could not emulate."""
        code = exit.instruction.hex(" ") or "unknown bytes"
        return f"KVM could not emulate the instruction at {where} ({code})"

    def coalesced(self, vcpu: Any) -> None:
        """Carry out the writes that KVM kept back, before the exit that came after them.

        Under a lock from taking to carrying out: the ring is the VM's, and another vCPU's exit
        must not overtake the writes that it relies on.
        """
        with self._ring_lock:
            for write in vcpu.coalesced_writes():
                self.coalesced_write(vcpu, write)

    # -- exits that a guest causes in the course of things ------------------------------------

    def mmio(self, vcpu: AnsweringVcpu, exit: exits.MmioExit) -> None:
        """Registers in memory; where there are none, reads answer all ones, writes vanish."""
        found = self._registers.find(exit.gpa)
        if exit.is_write:
            if found is not None:
                device, offset = found
                value = int.from_bytes(exit.data, "little")
                bank_of(device, vcpu.index).write(offset, exit.size, value)
        elif found is None:
            vcpu.answer_mmio(b"\xff" * exit.size)
        else:
            device, offset = found
            value = bank_of(device, vcpu.index).read(offset, exit.size)
            vcpu.answer_mmio(value.to_bytes(exit.size, "little"))

    def memory_fault(self, vcpu: AnsweringVcpu, exit: exits.MemoryFaultExit) -> None:
        """An implicit conversion, where the scheme has those: KVM_RUN tries the access again."""
        kind = Kind.UNSHARE if exit.private else Kind.SHARE
        answer = -errno.EFAULT
        if exit.errno == errno.EFAULT:  # not EHWPOISON: the host's memory is broken
            answer = self._converter.fault(kind, exit.gpa, exit.size, vcpu.index)
        if answer == 0:
            return
        side = "private" if exit.private else "shared"
        where = f"{side} memory at GPA {exit.gpa:#x}, {exit.size} bytes"
        if answer in (-errno.EFAULT, -errno.EOPNOTSUPP):
            self._stop(Outcome(INTERNAL_ERROR, f"KVM cannot serve the guest's access to {where}"))
            return
        name = errno.errorcode.get(-answer, str(-answer))
        reason = f"the guest uses {where}; the {kind.value} that this takes was refused: {name}"
        self._stop(Outcome(FAILED, reason))

    # -- exits that end the run ---------------------------------------------------------------

    def system_event(self, vcpu: AnsweringVcpu, exit: exits.SystemEventExit) -> None:
        name = _SYSTEM_EVENTS.get(exit.type, f"event {exit.type}")
        word = {1: POWEROFF, 2: RESET, 3: PANIC}.get(exit.type, FAILED)
        self._stop(Outcome(word, f"KVM system event: {name}"))

    def fail_entry(self, vcpu: AnsweringVcpu, exit: exits.FailEntryExit) -> None:
        reason = f"the processor refused vCPU {vcpu.index}'s state ({exit.hardware_reason:#x})"
        self._stop(Outcome(INTERNAL_ERROR, reason))

    def internal_error(self, vcpu: AnsweringVcpu, exit: exits.InternalErrorExit) -> None:
        where = self.where(vcpu)
        if exit.suberror == 1:
            reason = self.not_emulated(exit, where)
        else:
            data = ", ".join(f"{word:#x}" for word in exit.data)
            reason = f"KVM internal error {exit.suberror} at {where}, data [{data}]"
        self._stop(Outcome(INTERNAL_ERROR, reason))

    def debug(self, vcpu: AnsweringVcpu, exit: exits.DebugExit) -> None:
        """Only a debugger has KVM make such exits, and it takes this handler's place."""
        reason = f"a debug exit at {exit.pc:#x}, and no debugger is attached"
        self._stop(Outcome(INTERNAL_ERROR, reason))

    def unknown(self, vcpu: AnsweringVcpu, exit: exits.UnknownExit) -> None:
        self._stop(Outcome(INTERNAL_ERROR, f"KVM exit {exit.reason} ({exit.name}) has no handler"))
