"""Where cases run: a KVM that makes VMs, and guests for them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from kvm_bindings import System, Vm, ioctls
from vmm.core.ranges import Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.selftest.guest import CODE_SIZE, GuestCpu, KvmGuestCpu, guest_code


class Platform(Protocol):
    """A KVM, or a model of one."""

    system: System

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], c_mask: int
    ) -> list[GuestCpu]:
        """`count` vCPUs that can reach `ram` (at or above CODE_SIZE), closed with `opened`."""
        ...


class KvmPlatform:
    """This host's KVM."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._cpuid = system.supported_cpuid()

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], c_mask: int
    ) -> list[GuestCpu]:
        code = MemfdBacking(CODE_SIZE, "pyvmm-selftest")
        opened.callback(code.close)
        for gpa, data in guest_code(ram, c_mask):
            code.pwrite(data, gpa)
        # The highest slot: those that a scheme hands out start at 0.
        slot = vm.check_extension(ioctls.KVM_CAP_NR_MEMSLOTS) - 1
        vm.set_user_memory_region(slot, 0, CODE_SIZE, code.hva)
        guests: list[GuestCpu] = []
        for number in range(count):
            vcpu = vm.create_vcpu(number)
            opened.callback(vcpu.close)
            guests.append(KvmGuestCpu(vcpu, self._cpuid))
        return guests
