"""Micro-guests in x86 machine code: real mode, or long mode at CPL 0 or 3."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal

from kvm_bindings.exits import Exit, IoExit
from kvm_bindings.x86_64 import System, Vcpu, Vm
from vmm.host.probes import micro_guest
from vmm.host.probes.micro_guest import AREA_SIZE, RAM_SIZE, WORD_AT, Verb, mapped, memory_file

Mode = Literal["real", "kernel", "user"]

REAL_CODE_GPA = 0x1000
"""Where real-mode code lies, in segment 0."""
AREA_GPA = RAM_SIZE

DONE_PORT = 0x10
OUT_DONE = b"\xe6\x10"
"""out 0x10, al: how a micro-guest says that it got there."""

VERBS = {
    Verb.DONE: OUT_DONE,
    Verb.DONE_FOR_EVER: OUT_DONE + b"\xeb\xfc",
    # mov rax, [rdi+8]; mov [rdi+8], rsi; out 0x10, eax; and again
    Verb.EXCHANGE: b"\x48\x8b\x47\x08\x48\x89\x77\x08\xe7\x10\xeb\xf4",
}
assert WORD_AT == 8, "the displacement in EXCHANGE"


class MicroGuest(micro_guest.MicroGuest):
    """A VM with one vCPU and RAM from 0 in a memfd. A context manager; main thread only.

    `mode` is real mode, or long mode at CPL 0 ("kernel") or CPL 3 ("user"); in long mode VA = GPA
    for RAM and area, and with `c_mask` also VA = GPA | c_mask. Raises KvmError where KVM refuses.
    """

    area_gpa = AREA_GPA
    vm: Vm
    vcpu: Vcpu
    memfd: int
    """RAM."""

    def __init__(
        self,
        system: System,
        code: bytes,
        mode: Mode = "real",
        *,
        c_mask: int = 0,
        irqchip: bool = False,
        registers: Mapping[str, int] | None = None,
        vm_type: int = 0,
        seconds: float | None = None,
    ) -> None:
        with ExitStack() as opened:
            self.memfd = memory_file(opened, RAM_SIZE)
            hva = mapped(opened, self.memfd, RAM_SIZE)
            self.vm = opened.enter_context(system.create_vm(vm_type))
            if irqchip:
                self.vm.create_irqchip()
            self.vm.set_user_memory_region(0, 0, RAM_SIZE, hva)
            self.vcpu = self.vm.create_vcpu(0)
            opened.callback(self.vcpu.close)
            if mode == "real":
                os.pwrite(self.memfd, code, REAL_CODE_GPA)
                self.vcpu.update_sregs({"cs": {"base": 0, "selector": 0}})
                state = {"rip": REAL_CODE_GPA, "rsp": 0x8000, "rflags": 2}
            else:
                state = self._enter_long_mode(system, code, mode, c_mask)
            self.vcpu.set_regs({**state, **(registers or {})})
            super().__init__(opened.pop_all(), self.vm, self.vcpu, seconds)

    def _enter_long_mode(
        self, system: System, code: bytes, mode: Mode, c_mask: int
    ) -> dict[str, int]:
        # Not on the way to a guest, which needs the real-mode probe only.
        from vmm.arch.x86_64 import layout
        from vmm.arch.x86_64.page_tables import payload_tables
        from vmm.arch.x86_64.registers import linux64_entry, payload_entry
        from vmm.core.ranges import Range

        tables = payload_tables([Range(0, AREA_GPA + AREA_SIZE)], c_mask)
        entry = payload_entry if mode == "user" else linux64_entry
        state = entry(layout.PAYLOAD_GPA, tables.cr3)
        for gpa, data in [*tables.writes, *state.writes, (layout.PAYLOAD_GPA, code)]:
            os.pwrite(self.memfd, data, gpa)
        # CPUID first: KVM refuses EFER.LME to a vCPU that doesn't have long mode.
        self.vcpu.set_cpuid2(system.supported_cpuid())
        self.vcpu.update_sregs(state.sregs)  # type: ignore[arg-type]  # a TypedDict
        return state.regs

    def word(self, exit: Exit) -> int | None:
        if isinstance(exit, IoExit) and exit.port == DONE_PORT:
            return int.from_bytes(exit.data, "little")
        return None
