"""Micro-guests in arm64 machine code, at EL1 with the MMU on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack

from kvm_bindings.aarch64 import System, Vcpu, Vm, ioctls
from kvm_bindings.aarch64.registers import CORE_REGISTERS, SYSTEM_REGISTERS
from kvm_bindings.device import Device
from kvm_bindings.exits import Exit, MmioExit
from vmm.arch.aarch64.gic import create_gic
from vmm.arch.aarch64.machine_code import (
    DEVICES_GPA,
    DONE,
    DONE_GPA,
    EXCHANGE,
    Code,
    assembled,
    vectors,
)
from vmm.arch.aarch64.page_tables import TABLES_SIZE, identity_tables
from vmm.core.ranges import PAGE_SIZE
from vmm.host.probes import micro_guest as base
from vmm.host.probes.micro_guest import RAM_SIZE, WORD_AT, Verb, mapped, memory_file

__all__ = ["AREA_GPA", "CODE_GPA", "DONE_GPA", "MicroGuest", "micro_guest"]

TABLES_GPA = 0
VECTORS_GPA = TABLES_GPA + TABLES_SIZE
CODE_GPA = VECTORS_GPA + PAGE_SIZE
AREA_GPA = RAM_SIZE

VERBS = {Verb.DONE: DONE, Verb.DONE_FOR_EVER: DONE, Verb.EXCHANGE: EXCHANGE}
assert WORD_AT == 8, "the offset in EXCHANGE"


def environment(tables: int, vector_table: int) -> tuple[list[tuple[int, bytes]], dict[int, int]]:
    """What small guests run in: memory to write as (GPA, bytes), and the registers to set."""
    identity = identity_tables(tables, DEVICES_GPA)
    writes = [(tables, identity.data), (vector_table, vectors())]
    registers = {"VBAR_EL1": vector_table, **identity.registers}
    return writes, {SYSTEM_REGISTERS[name]: value for name, value in registers.items()}


def set_registers(vcpu: Vcpu, registers: Mapping[str, int]) -> None:
    """Set core registers by name. Raises KvmError."""
    for name, value in registers.items():
        vcpu.set_one_reg(CORE_REGISTERS[name], value)


class MicroGuest(base.MicroGuest):
    """A VM with one vCPU and RAM from 0 in a memfd. A context manager; main thread only.

    Raises KvmError where KVM refuses.
    """

    area_gpa = AREA_GPA
    vm: Vm
    vcpu: Vcpu
    memfd: int
    """RAM."""
    hva: int
    """Its mapping, for system calls."""
    gic: Device
    """KVM's GICv3, where it was asked for."""

    def __init__(
        self,
        system: System,
        code: bytes,
        *,
        registers: Mapping[str, int] | None = None,
        vm_type: int = 0,
        gic: bool = False,
        seconds: float | None = None,
    ) -> None:
        """`registers` are core registers by name; the program counter is at the code."""
        with ExitStack() as opened:
            self.memfd = memory_file(opened, RAM_SIZE)
            self.hva = mapped(opened, self.memfd, RAM_SIZE)
            self.vm = opened.enter_context(system.create_vm(vm_type))
            self.vm.set_user_memory_region(0, 0, RAM_SIZE, self.hva)
            if gic:
                self.gic = opened.enter_context(create_gic(self.vm))
            self.vcpu = self.vm.create_vcpu(0)
            opened.callback(self.vcpu.close)
            self.vcpu.init(self.vm.preferred_target(), ioctls.KVM_ARM_VCPU_PSCI_0_2)
            writes, system_registers = environment(TABLES_GPA, VECTORS_GPA)
            for gpa, data in [*writes, (CODE_GPA, code)]:
                os.pwrite(self.memfd, data, gpa)
            for register, value in system_registers.items():
                self.vcpu.set_one_reg(register, value)
            set_registers(self.vcpu, {"pc": CODE_GPA, "x19": DONE_GPA, **(registers or {})})
            if gic:
                self.gic.set_attr(
                    ioctls.KVM_DEV_ARM_VGIC_GRP_CTRL, ioctls.KVM_DEV_ARM_VGIC_CTRL_INIT
                )
            super().__init__(opened.pop_all(), self.vm, self.vcpu, seconds)

    def word(self, exit: Exit) -> int | None:
        if isinstance(exit, MmioExit) and exit.gpa == DONE_GPA and exit.is_write:
            return int.from_bytes(exit.data, "little")
        return None


def micro_guest(
    system: System,
    verb: Verb | Code,
    *,
    address: int = 0,
    word: int = 0,
    vm_type: int = 0,
    seconds: float | None = None,
) -> MicroGuest:
    """See HostArchitecture.micro_guest; `address` 0 is the area."""
    code = VERBS[verb] if isinstance(verb, Verb) else verb
    registers = {"x0": address or AREA_GPA, "x1": word}
    return MicroGuest(
        system, assembled(code), registers=registers, vm_type=vm_type, seconds=seconds
    )
