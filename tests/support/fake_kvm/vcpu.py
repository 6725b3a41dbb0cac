"""A modelled vCPU: KVM_RUN carries out a script of guest instructions up to the next exit."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvm_bindings import KvmError
from kvm_bindings.exits import Exit, HltExit, HypercallExit, InterruptedExit, IoExit
from tests.support.fake_kvm.kernel import EINVAL
from vmm.arch.x86_64.doorbells import KVM_HC_MAP_GPA_RANGE
from vmm.core.ranges import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from tests.support.fake_kvm.vm import FakeVm

_U64 = (1 << 64) - 1
_KVM_ENOSYS = 1000  # include/uapi/linux/kvm_para.h


class Load(NamedTuple):
    """mov reg, [gpa]"""

    gpa: int


class Store(NamedTuple):
    """mov [gpa], word"""

    gpa: int
    word: int


class Hypercall(NamedTuple):
    """vmmcall"""

    number: int
    args: tuple[int, int, int, int]


class Out(NamedTuple):
    """out port, value"""

    port: int
    size: int
    value: int


class In(NamedTuple):
    """in port"""

    port: int
    size: int


Instruction = Load | Store | Hypercall | Out | In


@dataclass
class _Pending:
    """An exit that waits for its answer."""

    answer: int = 0
    data: bytes = b""


class FakeVcpu:
    """kvm_bindings.Vcpu's methods. `script` is what the guest does, `results` what it saw: the
    value of each Load and In, the result of each Hypercall."""

    def __init__(self, vm: FakeVm, index: int) -> None:
        self._vm = vm
        self.index = index
        self.fd = 0
        self.immediate_exit = False
        self.has_coalesced_writes = False
        self.script: deque[Instruction] = deque()
        self.results: list[int] = []
        self._pending: tuple[Instruction, _Pending] | None = None

    def run(self) -> Exit:
        """KVM_RUN; HltExit at the script's end."""
        self._complete()
        if self.immediate_exit:
            return InterruptedExit(errno.EINTR)
        self._vm.kernel.enter("KVM_RUN", f"vcpu={self.index}")
        while self.script:
            exit = self._step(self.script[0])
            if exit is not None:
                return exit
            self.script.popleft()
        return HltExit()

    def _step(self, instruction: Instruction) -> Exit | None:
        """Carry out an instruction; the exit it causes, if any. What faults is repeated."""
        if isinstance(instruction, Load):
            found = self._vm.guest_read(instruction.gpa)
            if not isinstance(found, bytes):
                return found
            self.results.append(int.from_bytes(found, "little"))
            return None
        if isinstance(instruction, Store):
            word = instruction.word.to_bytes(8, "little")
            return self._vm.guest_write(instruction.gpa, word)
        if isinstance(instruction, Hypercall):
            return self._hypercall(instruction)
        self._pending = (self.script.popleft(), _Pending())
        if isinstance(instruction, Out):
            data = instruction.value.to_bytes(instruction.size, "little")
            return IoExit(instruction.port, instruction.size, 1, True, data)
        return IoExit(instruction.port, instruction.size, 1, False, b"")

    def _hypercall(self, call: Hypercall) -> Exit | None:
        """arch/x86/kvm/x86.c, ____kvm_emulate_hypercall: what KVM checks before it exits."""
        gpa, pages, attributes, fourth = call.args
        if call.number != KVM_HC_MAP_GPA_RANGE or not self._vm.hypercall_exits >> 12 & 1:
            self.results.append(-_KVM_ENOSYS & _U64)
            return None
        frame = gpa >> PAGE_SHIFT
        if gpa % PAGE_SIZE or not pages or (frame + pages) & _U64 <= frame:
            self.results.append(-EINVAL & _U64)
            return None
        self._pending = (self.script.popleft(), _Pending())
        return HypercallExit(call.number, (gpa, pages, attributes, fourth, 0, 0), 0)

    def _complete(self) -> None:
        """Give the guest the answer to its last exit, as the next KVM_RUN does."""
        if self._pending is None:
            return
        instruction, pending = self._pending
        self._pending = None
        if isinstance(instruction, Hypercall):
            self.results.append(pending.answer)
        elif isinstance(instruction, In):
            self.results.append(int.from_bytes(pending.data, "little"))

    # -- answers ------------------------------------------------------------------------------

    def answer_hypercall(self, result: int) -> None:
        if self._pending is None:
            raise AssertionError("no hypercall waits for an answer")
        self._pending[1].answer = result & _U64

    def answer_io(self, data: bytes) -> None:
        if self._pending is None:
            raise AssertionError("no port read waits for an answer")
        self._pending[1].data = data

    def answer_mmio(self, data: bytes) -> None:
        self.script.popleft()
        self.results.append(int.from_bytes(data, "little"))

    def answer_msr(self, value: int | None, *, known: bool) -> None:
        raise AssertionError("no guest of this model reads an MSR")

    def coalesced_writes(self) -> Iterator[IoExit]:
        return iter(())

    def get_regs(self) -> dict[str, int]:
        return {"rip": 0}

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        self._vm.kernel.enter("KVM_PRE_FAULT_MEMORY", f"{gpa=:#x}, {size=:#x}")
        if not self._vm.kernel.pre_fault:
            raise KvmError("KVM_PRE_FAULT_MEMORY", errno.EOPNOTSUPP)
        if gpa % PAGE_SIZE or size % PAGE_SIZE or not size:
            raise KvmError("KVM_PRE_FAULT_MEMORY", EINVAL)
        for page in range(gpa, gpa + size, PAGE_SIZE):
            found = self._vm.guest_read(page)
            if not isinstance(found, bytes):
                number = errno.EFAULT if self._vm.slots.at(page) else errno.ENOENT
                raise KvmError("KVM_PRE_FAULT_MEMORY", number, f"gpa={page:#x}")

    def ignore(self, *arguments: object, **named: object) -> None:
        """Accepted: registers and the like."""

    set_cpuid2 = update_sregs = set_regs = set_msrs = close = ignore
