"""Where cases run: a KVM that makes VMs, and guests for them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from kvm_bindings import ioctls
from kvm_bindings.x86_64 import System, Vm
from vmm.arch.x86_64.cpuid import choose_c_bit
from vmm.conversion.scheme import Scheme
from vmm.conversion.schemes.remap import Parking
from vmm.core.ranges import Range
from vmm.machine.schemes import make_scheme
from vmm.memory.backings.memfd import MemfdBacking
from vmm.selftest.guest import CODE_SIZE, Gate, GuestCpu, KvmGuestCpu, guest_code


class Platform(Protocol):
    """A KVM, or a model of one."""

    system: System
    is_modelled: bool

    def scheme(self, name: str, parked: Parking) -> Scheme:
        """A new scheme of that name. Raises HostError where there can't be one."""
        ...

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> list[GuestCpu]:
        """`count` vCPUs that can reach `ram` (at or above CODE_SIZE), closed with `opened`."""
        ...


class KvmPlatform:
    """This host's KVM."""

    is_modelled = False

    def __init__(self, system: System) -> None:
        self.system = system
        self._cpuid = system.supported_cpuid()

    def scheme(self, name: str, parked: Parking) -> Scheme:
        return make_scheme(name, lambda: choose_c_bit(self._cpuid), parked)

    def guests(
        self, opened: ExitStack, vm: Vm, count: int, ram: Sequence[Range], alias: int, gate: Gate
    ) -> list[GuestCpu]:
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
            guests.append(KvmGuestCpu(vcpu, self._cpuid, gate))
        return guests
