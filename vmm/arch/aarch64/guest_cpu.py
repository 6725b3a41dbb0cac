"""The guest that does what it is told, in arm64 machine code, at EL1 with the MMU on.

The registers carry the arguments in and the result out, and a store to DONE_GPA ends each verb.
On a protected VM, too: pKVM isolates memory, and leaves registers to the host (Linux 7.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kvm_bindings import ioctls
from kvm_bindings.aarch64 import System, Vcpu, Vm
from kvm_bindings.aarch64 import ioctls as arm
from kvm_bindings.aarch64.registers import CORE_REGISTERS
from kvm_bindings.exits import Exit, MmioExit
from vmm.arch import guest_cpu
from vmm.arch.aarch64 import machine_code
from vmm.arch.aarch64.machine_code import DONE_GPA, Code, assembled
from vmm.arch.aarch64.micro_guest import CODE_GPA, TABLES_GPA, VECTORS_GPA, environment
from vmm.arch.guest_cpu import CODE_SIZE, WORD, Gate, GuestCpu
from vmm.core.ranges import Range
from vmm.memory.backings.memfd import MemfdBacking

MEM_SHARE, MEM_UNSHARE = 0xC600_0003, 0xC600_0004
"""pKVM's calls of one page (Documentation/virt/kvm/arm/hypercalls.rst)."""

_STRIDE = 64
_VERBS: tuple[Code, ...] = (
    machine_code.READ,
    machine_code.WRITE,
    machine_code.FILL,
    machine_code.HOLDS,
    machine_code.HVC,
)
_READ_AT, _WRITE_AT, _FILL_AT, _HOLDS_AT, _HVC_AT = (
    CODE_GPA + _STRIDE * number for number in range(len(_VERBS))
)


def guest_code() -> list[tuple[int, bytes]]:
    """What the first CODE_SIZE bytes of guest memory have to hold, as (GPA, bytes)."""
    writes, _ = environment(TABLES_GPA, VECTORS_GPA)
    verbs = [(CODE_GPA + _STRIDE * number, assembled(verb)) for number, verb in enumerate(_VERBS)]
    return [*writes, *verbs]


class ArmGuestCpu(guest_cpu.KvmGuestCpu):
    """A GuestCpu on a real KVM."""

    vcpu: Vcpu

    def __init__(self, vcpu: Vcpu, target: int, gate: Gate) -> None:
        """Sets the vCPU's registers up; guest_code is in memory by the time of the first verb."""
        super().__init__(vcpu, gate)
        vcpu.init(target, arm.KVM_ARM_VCPU_PSCI_0_2)
        _, registers = environment(TABLES_GPA, VECTORS_GPA)
        for register, value in registers.items():
            vcpu.set_one_reg(register, value)
        vcpu.set_one_reg(CORE_REGISTERS["x19"], DONE_GPA)

    def read(self, address: int) -> int:
        self._do(_READ_AT, address)
        return self.vcpu.get_one_reg(CORE_REGISTERS["x1"])

    def write(self, address: int, word: int) -> None:
        self._do(_WRITE_AT, address, word)

    def fill(self, address: int, size: int, word: int) -> None:
        self._do(_FILL_AT, address, word, size // WORD)

    def holds(self, address: int, size: int, word: int) -> bool:
        self._do(_HOLDS_AT, address, word, size // WORD)
        return self.vcpu.get_one_reg(CORE_REGISTERS["x2"]) == 0

    def hypercall(self, function: int, x1: int = 0, x2: int = 0, x3: int = 0) -> int:
        """An SMCCC call by HVC; x0 of the answer (two's complement, 64 bits)."""
        self._do(_HVC_AT, function, x1, x2, x3)
        return self.vcpu.get_one_reg(CORE_REGISTERS["x0"])

    def is_done(self, exit: Exit) -> bool:
        return isinstance(exit, MmioExit) and exit.gpa == DONE_GPA and exit.is_write

    def _do(self, verb: int, *arguments: int) -> None:
        """Run a verb with the arguments in x0 and up."""
        for number, value in enumerate(arguments):
            self.vcpu.set_one_reg(CORE_REGISTERS[f"x{number}"], value)
        self.vcpu.set_one_reg(CORE_REGISTERS["pc"], verb)
        self.run_verb()
        # The store that ended the verb is over only when KVM has moved the program counter past
        # it, at the next KVM_RUN: that must not be the next verb's.
        self._complete()


@contextmanager
def guest_cpus(
    system: System, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
) -> Iterator[Sequence[GuestCpu]]:
    """See Architecture.guest_cpus. All addresses are mapped, whatever `ram` and `alias` are."""
    del system, ram, alias
    with ExitStack() as opened:
        code = MemfdBacking(CODE_SIZE, "pyvmm-selftest")
        opened.callback(code.close)
        for gpa, data in guest_code():
            code.pwrite(data, gpa)
        # The highest slot: those that a scheme hands out start at 0.
        slot = vm.check_extension(ioctls.KVM_CAP_NR_MEMSLOTS) - 1
        vm.set_user_memory_region(slot, 0, CODE_SIZE, code.hva)
        target = vm.preferred_target()
        guests: list[GuestCpu] = []
        for number in range(count):
            vcpu = vm.create_vcpu(number)
            opened.callback(vcpu.close)
            guests.append(ArmGuestCpu(vcpu, target, gate))
        yield guests
