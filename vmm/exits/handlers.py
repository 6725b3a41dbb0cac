"""One handler per exit class: what the guest asked for, handed to the room that knows.

Handlers can be called with hand-made exits and anything that answers like a vCPU.
"""

from __future__ import annotations

import errno
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kvm_bindings import exits
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.doorbells import (
    KVM_HC_MAP_GPA_RANGE,
    Failure,
    HostCheck,
    PortDoorbell,
    decode_map_gpa_range,
)
from vmm.conversion.transaction import Converter
from vmm.core.events import Kind
from vmm.exits.host_check import host_check
from vmm.exits.outcome import (
    FAILED,
    INTERNAL_ERROR,
    PANIC,
    POWEROFF,
    RESET,
    TRIPLE_FAULT,
    Outcome,
)
from vmm.memory.guest_memory import GuestMemory

_SYSTEM_EVENTS = {1: "shutdown", 2: "reset", 3: "crash"}


class AnsweringVcpu(Protocol):
    """The part of kvm_bindings.Vcpu that handlers use."""

    index: int

    def coalesced_writes(self) -> Iterator[exits.MmioExit | exits.IoExit]: ...
    def answer_io(self, data: bytes) -> None: ...
    def answer_mmio(self, data: bytes) -> None: ...
    def answer_hypercall(self, result: int) -> None: ...
    def answer_msr(self, value: int | None, *, known: bool) -> None: ...
    def get_regs(self) -> dict[str, int]: ...


class Ports(Protocol):
    """A port bus: the device at a port with the port's offset in it, or None."""

    def find(self, port: int) -> tuple[Any, int] | None: ...


class Registers(Protocol):
    """A memory bus: the device at a GPA with the address' offset in it, or None."""

    def find(self, gpa: int) -> tuple[Any, int] | None: ...


class Msrs(Protocol):
    """Model-specific registers that KVM leaves to user space."""

    def read(self, index: int) -> int | None: ...
    def write(self, index: int, value: int) -> bool: ...


class ExitHandlers:
    """Dispatches exits; shared by all vCPUs of a machine, called on their threads."""

    def __init__(
        self,
        ports: Ports,
        registers: Registers,
        msrs: Msrs,
        memory: GuestMemory,
        converter: Converter,
        doorbell: PortDoorbell,
        stop: Callable[[Outcome], None],
    ) -> None:
        self._ports = ports
        self._registers = registers
        self._msrs = msrs
        self._memory = memory
        self._converter = converter
        self._doorbell = doorbell
        self._stop = stop
        self._ring_lock = threading.Lock()
        # By vCPU, because two threads must not count in one place.
        self._port_counts: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self.table: dict[type[Any], tuple[str, Callable[[Any, Any], None]]] = {
            exits.IoExit: ("io", self.io),
            exits.MmioExit: ("mmio", self.mmio),
            exits.HypercallExit: ("hypercall", self.hypercall),
            exits.RdmsrExit: ("rdmsr", self.rdmsr),
            exits.WrmsrExit: ("wrmsr", self.wrmsr),
            exits.MemoryFaultExit: ("memory_fault", self.memory_fault),
            exits.SystemEventExit: ("system_event", self.system_event),
            exits.ShutdownExit: ("shutdown", self.shutdown),
            exits.HltExit: ("hlt", self.hlt),
            exits.FailEntryExit: ("fail_entry", self.fail_entry),
            exits.InternalErrorExit: ("internal_error", self.internal_error),
            exits.ArmNisvExit: ("arm_nisv", self.arm_nisv),
            exits.UnknownExit: ("unknown", self.unknown),
        }

    # -- port I/O -----------------------------------------------------------------------------

    def io(self, vcpu: AnsweringVcpu, exit: exits.IoExit) -> None:
        port, counts = exit.port, self._port_counts[vcpu.index]
        counts[port] = counts.get(port, 0) + 1
        self._port_io(vcpu, exit)

    def port_counts(self) -> dict[int, int]:
        """Exits per I/O port, for the report: where a slow boot spends its time."""
        total: Counter[int] = Counter()
        for counts in self._port_counts.values():
            total.update(counts)
        return dict(total)

    def coalesced(self, vcpu: AnsweringVcpu) -> None:
        """Carry out the writes that KVM kept back, before the exit that came after them.

        Under a lock from taking to carrying out: the ring is the VM's, and another vCPU's exit
        must not overtake the writes that it relies on.
        """
        with self._ring_lock:
            for write in vcpu.coalesced_writes():
                if isinstance(write, exits.IoExit):
                    self._port_io(vcpu, write)
                else:
                    self.mmio(vcpu, write)

    def _port_io(self, vcpu: AnsweringVcpu, exit: exits.IoExit) -> None:
        port, size = exit.port, exit.size
        found = self._ports.find(port)
        if found is None:
            self._io_elsewhere(vcpu, exit)
            return
        device, offset = found
        if exit.times == 1:
            if exit.is_write:
                device.write(offset, size, int.from_bytes(exit.data, "little"))
            else:
                vcpu.answer_io(device.read(offset, size).to_bytes(size, "little"))
        elif exit.is_write:
            self._string_write(device, offset, exit)
        else:
            # String I/O advances the data, never the port.
            words = (device.read(offset, size) for _ in range(exit.times))
            vcpu.answer_io(b"".join(word.to_bytes(size, "little") for word in words))

    def _string_write(self, device: Any, offset: int, exit: exits.IoExit) -> None:
        size, data = exit.size, exit.data
        write_bytes = getattr(device, "write_bytes", None)
        if write_bytes is not None and offset == 0 and size == 1:
            write_bytes(data)
            return
        for start in range(0, len(data), size):
            device.write(offset, size, int.from_bytes(data[start : start + size], "little"))

    def _io_elsewhere(self, vcpu: AnsweringVcpu, exit: exits.IoExit) -> None:
        """The doorbell, whose latches are per vCPU, and ports that nobody answers."""
        offset = exit.port - layout.DOORBELL_PORT
        inside = 0 <= offset < layout.DOORBELL_PORTS
        if not exit.is_write:
            if not inside:
                vcpu.answer_io(b"\xff" * (exit.size * exit.times))
                return
            value = self._doorbell.read(vcpu.index, offset, exit.size)
            vcpu.answer_io(value.to_bytes(exit.size, "little") * exit.times)
        elif inside:
            for start in range(0, len(exit.data), exit.size):
                value = int.from_bytes(exit.data[start : start + exit.size], "little")
                self._ring(vcpu, offset, exit.size, value)

    def _ring(self, vcpu: AnsweringVcpu, offset: int, size: int, value: int) -> None:
        command = self._doorbell.write(vcpu.index, offset, size, value)
        if command is None:
            return
        if isinstance(command, Failure):
            self._stop(Outcome(FAILED, f"the guest reported failure code {command.code}"))
        elif isinstance(command, HostCheck):
            self._doorbell.answer(vcpu.index, host_check(self._memory, command.gpa, command.size))
        else:
            self._doorbell.answer(vcpu.index, self._converter.convert(command))

    # -- other exits that a guest causes in the course of things ------------------------------

    def mmio(self, vcpu: AnsweringVcpu, exit: exits.MmioExit) -> None:
        """Registers in memory; where there are none, reads answer all ones, writes vanish."""
        found = self._registers.find(exit.gpa)
        if exit.is_write:
            if found is not None:
                device, offset = found
                device.write(offset, exit.size, int.from_bytes(exit.data, "little"))
        elif found is None:
            vcpu.answer_mmio(b"\xff" * exit.size)
        else:
            device, offset = found
            vcpu.answer_mmio(device.read(offset, exit.size).to_bytes(exit.size, "little"))

    def hypercall(self, vcpu: AnsweringVcpu, exit: exits.HypercallExit) -> None:
        if exit.number != KVM_HC_MAP_GPA_RANGE:
            vcpu.answer_hypercall(-errno.ENOSYS)
            return
        request = decode_map_gpa_range(exit.args, vcpu.index)
        vcpu.answer_hypercall(self._converter.convert(request))

    def rdmsr(self, vcpu: AnsweringVcpu, exit: exits.RdmsrExit) -> None:
        value = self._msrs.read(exit.msr)
        vcpu.answer_msr(value, known=value is not None)

    def wrmsr(self, vcpu: AnsweringVcpu, exit: exits.WrmsrExit) -> None:
        vcpu.answer_msr(None, known=self._msrs.write(exit.msr, exit.value))

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

    def shutdown(self, vcpu: AnsweringVcpu, exit: exits.ShutdownExit) -> None:
        self._stop(Outcome(TRIPLE_FAULT, f"triple fault on vCPU {vcpu.index}"))

    def hlt(self, vcpu: AnsweringVcpu, exit: exits.HltExit) -> None:
        self._stop(Outcome(FAILED, f"vCPU {vcpu.index} halted with nothing that could wake it"))

    def fail_entry(self, vcpu: AnsweringVcpu, exit: exits.FailEntryExit) -> None:
        reason = f"the processor refused vCPU {vcpu.index}'s state ({exit.hardware_reason:#x})"
        self._stop(Outcome(INTERNAL_ERROR, reason))

    def internal_error(self, vcpu: AnsweringVcpu, exit: exits.InternalErrorExit) -> None:
        rip = vcpu.get_regs()["rip"]
        if exit.suberror == 1:
            code = exit.instruction.hex(" ") or "unknown bytes"
            reason = (
                f"KVM could not emulate the instruction at RIP {rip:#x} ({code}); where KVM "
                "interprets kernel-mode code a stock kernel does not run: use pyvmm lab"
            )
        else:
            data = ", ".join(f"{word:#x}" for word in exit.data)
            reason = f"KVM internal error {exit.suberror} at RIP {rip:#x}, data [{data}]"
        self._stop(Outcome(INTERNAL_ERROR, reason))

    def arm_nisv(self, vcpu: AnsweringVcpu, exit: exits.ArmNisvExit) -> None:
        reason = f"an access at {exit.gpa:#x} that the processor does not describe"
        self._stop(Outcome(INTERNAL_ERROR, f"{reason} (ESR ISS {exit.esr_iss:#x})"))

    def unknown(self, vcpu: AnsweringVcpu, exit: exits.UnknownExit) -> None:
        self._stop(Outcome(INTERNAL_ERROR, f"KVM exit {exit.reason} ({exit.name}) has no handler"))
