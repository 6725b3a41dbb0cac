"""The exits that only x86 has: port I/O, model-specific registers, hypercalls, triple faults."""

from __future__ import annotations

import errno
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from kvm_bindings import exits
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE, decode_map_gpa_range
from vmm.core.lean_typing import Any, Protocol
from vmm.devices.bus import Banked, PortDevice, takes_strings
from vmm.exits import handlers
from vmm.exits.handlers import Conversions, Registers, bank_of
from vmm.exits.outcome import FAILED, TRIPLE_FAULT, Outcome


class AnsweringVcpu(handlers.AnsweringVcpu, Protocol):
    """The part of kvm_bindings.x86_64.Vcpu that handlers use."""

    def coalesced_writes(self) -> Iterator[exits.IoExit]: ...
    def answer_io(self, data: bytes) -> None: ...
    def answer_hypercall(self, result: int) -> None: ...
    def answer_msr(self, value: int | None, *, known: bool) -> None: ...
    def get_regs(self) -> dict[str, int]: ...
    def kvmclock_ctrl(self) -> bool: ...


class Ports(Protocol):
    """A port bus: the device at a port with the port's offset in it, or None."""

    def find(self, port: int, /) -> tuple[PortDevice, int] | None: ...


class Msrs(Protocol):
    """Model-specific registers that KVM leaves to user space."""

    def read(self, index: int) -> int | None: ...
    def write(self, index: int, value: int) -> bool: ...


class X86ExitHandlers(handlers.ExitHandlers):
    """Dispatches exits; shared by all vCPUs of a machine, called on their threads."""

    def __init__(
        self,
        ports: Ports,
        registers: Registers,
        msrs: Msrs,
        converter: Conversions,
        stop: Callable[[Outcome], None],
    ) -> None:
        super().__init__(registers, converter, stop)
        self._ports = ports
        self._msrs = msrs
        # By vCPU, because two threads must not count in one place.
        self._port_counts: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self.table.update(
            {
                exits.IoExit: ("io", self.io),
                exits.HypercallExit: ("hypercall", self.hypercall),
                exits.RdmsrExit: ("rdmsr", self.rdmsr),
                exits.WrmsrExit: ("wrmsr", self.wrmsr),
                exits.ShutdownExit: ("shutdown", self.shutdown),
                exits.HltExit: ("hlt", self.hlt),
            }
        )

    def where(self, vcpu: AnsweringVcpu) -> str:
        return f"RIP {vcpu.get_regs()['rip']:#x}"

    def tell_stopped(self, vcpu: AnsweringVcpu) -> None:
        vcpu.kvmclock_ctrl()

    def not_emulated(self, exit: exits.InternalErrorExit, where: str) -> str:
        return (
            f"{super().not_emulated(exit, where)}; where KVM interprets kernel-mode code a stock "
            "kernel does not run: use pyvmm lab"
        )

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

    def coalesced_write(self, vcpu: AnsweringVcpu, exit: exits.IoExit) -> None:
        self._port_io(vcpu, exit)

    def _port_io(self, vcpu: AnsweringVcpu, exit: exits.IoExit) -> None:
        port, size = exit.port, exit.size
        found = self._ports.find(port)
        if found is None:
            if not exit.is_write:
                vcpu.answer_io(b"\xff" * (size * exit.times))
            return
        device, offset = found
        if device.__class__ is Banked:  # saves a call for nearly every exit
            device = bank_of(device, vcpu.index)
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

    def _string_write(self, device: PortDevice, offset: int, exit: exits.IoExit) -> None:
        size, data = exit.size, exit.data
        if offset == 0 and size == 1 and takes_strings(device):
            device.write_bytes(data)
            return
        for start in range(0, len(data), size):
            device.write(offset, size, int.from_bytes(data[start : start + size], "little"))

    # -- other exits that a guest causes in the course of things ------------------------------

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

    # -- exits that end the run ---------------------------------------------------------------

    def shutdown(self, vcpu: AnsweringVcpu, exit: exits.ShutdownExit) -> None:
        self._stop(Outcome(TRIPLE_FAULT, f"triple fault on vCPU {vcpu.index}"))

    def hlt(self, vcpu: AnsweringVcpu, exit: exits.HltExit) -> None:
        self._stop(Outcome(FAILED, f"vCPU {vcpu.index} halted with nothing that could wake it"))


def only_ports(ports: Ports) -> X86ExitHandlers:
    """Handlers for a guest that accesses ports and nothing else, as measurements want it."""
    unused: Any = None
    return X86ExitHandlers(ports, unused, unused, unused, lambda outcome: None)
