"""The exits that only arm64 has: SMC calls passed on, accesses that KVM can't describe, and its own
form of a debugger's."""

from __future__ import annotations

import errno
from collections.abc import Callable

from kvm_bindings import KvmError, exits
from kvm_bindings.aarch64.registers import CORE_REGISTERS
from vmm.arch.aarch64 import rsi
from vmm.core.lean_typing import Protocol
from vmm.exits import handlers
from vmm.exits.handlers import Conversions, Registers
from vmm.exits.outcome import INTERNAL_ERROR, Outcome

_SYSTEM_EVENT_RESET = 2  # KVM_SYSTEM_EVENT_RESET
_ARGUMENTS = tuple(CORE_REGISTERS[f"x{number}"] for number in range(4))


class AnsweringVcpu(handlers.AnsweringVcpu, Protocol):
    """The part of kvm_bindings.aarch64.Vcpu that handlers use."""

    def get_one_reg(self, register: int) -> int: ...
    def set_one_reg(self, register: int, value: int) -> None: ...


class Monitor(Protocol):
    """Who answers a realm's calls: x0 and as many registers behind it as there are."""

    def answer(self, function: int, x1: int, x2: int, x3: int, vcpu: int) -> tuple[int, ...]: ...


class ArmExitHandlers(handlers.ExitHandlers):
    """Dispatches exits; shared by all vCPUs of a machine, called on their threads."""

    def __init__(
        self,
        registers: Registers,
        converter: Conversions,
        stop: Callable[[Outcome], None],
        reset: Callable[[], None],
        monitor: Monitor | None = None,
    ) -> None:
        """`reset` is called when the guest resets the machine; `monitor` answers RSI calls,
        without one the guest is told that there is none."""
        super().__init__(registers, converter, stop)
        self._reset = reset
        self._monitor = monitor
        self.table.update(
            {
                exits.HypercallExit: ("hypercall", self.hypercall),
                exits.ArmNisvExit: ("arm_nisv", self.nisv),
                exits.ArmDebugExit: ("debug", self.arm_debug),
            }
        )

    def where(self, vcpu: AnsweringVcpu) -> str:
        try:
            return f"PC {vcpu.get_one_reg(CORE_REGISTERS['pc']):#x}"
        except KvmError:  # a protected guest's registers are its own
            return "an unknown PC"

    def hypercall(self, vcpu: AnsweringVcpu, exit: exits.HypercallExit) -> None:
        """A call that KVM's filter passes on: arguments and results are in the registers, and
        the program counter is past it (Documentation/virt/kvm/api.rst, KVM_EXIT_HYPERCALL)."""
        answer: tuple[int, ...] = (rsi.NOT_SUPPORTED,)
        if self._monitor is not None:
            x1, x2, x3 = (vcpu.get_one_reg(register) for register in _ARGUMENTS[1:])
            answer = self._monitor.answer(exit.number, x1, x2, x3, vcpu.index)
        for register, value in zip(_ARGUMENTS, answer, strict=False):
            vcpu.set_one_reg(register, value)

    def system_event(self, vcpu: handlers.AnsweringVcpu, exit: exits.SystemEventExit) -> None:
        """PSCI: a reset ends the run as the board says, which knows a kernel's panic."""
        if exit.type == _SYSTEM_EVENT_RESET:
            self._reset()
        else:
            super().system_event(vcpu, exit)

    def arm_debug(self, vcpu: AnsweringVcpu, exit: exits.ArmDebugExit) -> None:
        """Only a debugger has KVM make such exits, and it takes this handler's place."""
        reason = f"a debug exit at {self.where(vcpu)}, and no debugger is attached"
        self._stop(Outcome(INTERNAL_ERROR, reason))

    def nisv(self, vcpu: AnsweringVcpu, exit: exits.ArmNisvExit) -> None:
        where = self.where(vcpu)
        reason = (
            f"the instruction at {where} accesses GPA {exit.gpa:#x}, where no RAM is, in a way "
            f"that the processor doesn't describe (ISS {exit.esr_iss:#x}): no plain load or store"
        )
        self._stop(Outcome(INTERNAL_ERROR, reason))


def without_ports(registers: Registers) -> ArmExitHandlers:
    """Handlers for a guest that accesses registers in memory and nothing else, as measurements
    want it."""
    return ArmExitHandlers(registers, _NoConversions(), lambda outcome: None, lambda: None)


class _NoConversions:
    """The converter of a VM without private memory."""

    def convert(self, request: object) -> int:
        return -errno.ENOSYS

    def fault(self, *request: object) -> int:
        return -errno.EFAULT
