"""The guest that does what it is told, in x86 machine code.

Its code is a few instructions for each verb, run at CPL 3, where no host interprets it. The
registers carry the arguments in and the result out, and a port write ends each verb.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kvm_bindings import ioctls
from kvm_bindings.exits import Exit, IoExit
from kvm_bindings.x86_64 import System, Vcpu, Vm
from vmm.arch import guest_cpu
from vmm.arch.guest_cpu import CODE_SIZE, WORD, Gate, GuestCpu
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.page_tables import payload_tables
from vmm.arch.x86_64.registers import payload_entry
from vmm.core.ranges import Range
from vmm.memory.backings.memfd import MemfdBacking

CODE_GPA = layout.PAYLOAD_GPA
DONE_PORT = 0x10

_DONE = b"\xe6\x10"  # out 0x10, al
# Each verb's address is in rdi.
_READ = b"\x48\x8b\x07" + _DONE  # mov rax, [rdi]
_WRITE = b"\x48\x89\x37" + _DONE  # mov [rdi], rsi
_FILL = b"\xf3\x48\xab" + _DONE  # rep stosq: rcx words of rax
_COMPARE = b"\xf3\x48\xaf" + _DONE  # repe scasq: rcx words with rax
_STRIDE = 16
_VERBS = (_READ, _WRITE, _FILL, _COMPARE)
_READ_AT, _WRITE_AT, _FILL_AT, _COMPARE_AT = (CODE_GPA + _STRIDE * n for n in range(len(_VERBS)))
_ZERO_FLAG = 1 << 6


def guest_code(ram: Sequence[Range], c_mask: int) -> list[tuple[int, bytes]]:
    """What the first CODE_SIZE bytes of guest memory have to hold, as (GPA, bytes)."""
    tables = payload_tables([Range(0, CODE_SIZE), *ram], c_mask)
    state = payload_entry(CODE_GPA, tables.cr3)
    verbs = [(CODE_GPA + _STRIDE * number, verb) for number, verb in enumerate(_VERBS)]
    return [*tables.writes, *state.writes, *verbs]


class X86GuestCpu(guest_cpu.KvmGuestCpu):
    """A GuestCpu on a real KVM."""

    vcpu: Vcpu

    def __init__(self, vcpu: Vcpu, supported_cpuid: Sequence[tuple[int, ...]], gate: Gate) -> None:
        """Sets the vCPU's registers up; guest_code is in memory by the time of the first verb."""
        super().__init__(vcpu, gate)
        state = payload_entry(CODE_GPA, layout.PAGE_TABLES_GPA)
        # CPUID first: KVM refuses EFER.LME to a vCPU that doesn't have long mode.
        vcpu.set_cpuid2(supported_cpuid)  # type: ignore[arg-type]  # tuples of seven
        vcpu.update_sregs(state.sregs)  # type: ignore[arg-type]  # a TypedDict
        self._registers = state.regs

    def read(self, address: int) -> int:
        self._do(_READ_AT, rdi=address)
        return self.vcpu.get_regs()["rax"]

    def write(self, address: int, word: int) -> None:
        self._do(_WRITE_AT, rdi=address, rsi=word)

    def fill(self, address: int, size: int, word: int) -> None:
        self._do(_FILL_AT, rdi=address, rcx=size // WORD, rax=word)

    def holds(self, address: int, size: int, word: int) -> bool:
        self._do(_COMPARE_AT, rdi=address, rcx=size // WORD, rax=word)
        registers = self.vcpu.get_regs()
        return registers["rcx"] == 0 and bool(registers["rflags"] & _ZERO_FLAG)

    def is_done(self, exit: Exit) -> bool:
        return isinstance(exit, IoExit) and exit.port == DONE_PORT

    def _do(self, verb: int, **registers: int) -> None:
        self.vcpu.set_regs({**self._registers, **registers, "rip": verb})
        self.run_verb()


@contextmanager
def guest_cpus(
    system: System, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
) -> Iterator[Sequence[GuestCpu]]:
    """See Architecture.guest_cpus."""
    cpuid = system.supported_cpuid()
    with ExitStack() as opened:
        code = MemfdBacking(CODE_SIZE, "pyvmm-selftest")
        opened.callback(code.close)
        for gpa, data in guest_code(ram, alias):
            code.pwrite(data, gpa)
        # The highest slot: those that a scheme hands out start at 0.
        slot = vm.check_extension(ioctls.KVM_CAP_NR_MEMSLOTS) - 1
        vm.set_user_memory_region(slot, 0, CODE_SIZE, code.hva)
        guests: list[GuestCpu] = []
        for number in range(count):
            vcpu = vm.create_vcpu(number)
            opened.callback(vcpu.close)
            guests.append(X86GuestCpu(vcpu, cpuid, gate))
        yield guests
