"""A modelled /dev/kvm."""

from __future__ import annotations

from typing import Self, cast

from kvm_bindings import ioctls
from kvm_bindings.x86_64 import System
from kvm_bindings.x86_64.system import CpuidTuple
from tests.support.fake_kvm.kernel import EINVAL, FakeKernel, refuse
from tests.support.fake_kvm.vm import FakeVm

CPUID: list[CpuidTuple] = [
    (0, 0, 0, 0xD, 0x6874_7541, 0x444D_4163, 0x6974_6E65),  # "AuthenticAMD"
    (0x8000_0008, 0, 0, 40, 0, 0, 0),  # 40 physical address bits
    (0x4000_0001, 0, 0, 0, 0, 0, 0),
]


class FakeSystem:
    """kvm_bindings.System's methods over a FakeKernel. Closing it closes its VMs."""

    def __init__(self, kernel: FakeKernel | None = None) -> None:
        self.kernel = kernel or FakeKernel()
        self._vms: list[FakeVm] = []

    def api_version(self) -> int:
        return ioctls.KVM_API_VERSION

    def check_extension(self, capability: int) -> int:
        if capability == ioctls.KVM_CAP_VM_TYPES:
            return sum(1 << number for number in self.kernel.vm_types)
        if capability == ioctls.KVM_CAP_MEMORY_ATTRIBUTES:
            # Asked of the system, KVM names what any VM could have.
            kernel = self.kernel
            known = 0
            for vm_type in kernel.vm_types.values():
                known |= vm_type.attributes
            return known if kernel.attributes_ioctl and not kernel.in_place else 0
        return FakeVm.capability(self.kernel, self.kernel.vm_types[0], capability)

    def vcpu_mmap_size(self) -> int:
        return 3 * 4096

    def create_vm(self, vm_type: int = 0) -> FakeVm:
        self.kernel.enter("KVM_CREATE_VM", f"type={vm_type}")
        if vm_type not in self.kernel.vm_types:
            raise refuse("KVM_CREATE_VM", EINVAL, f"type={vm_type}")
        vm = FakeVm(self.kernel, self.kernel.vm_types[vm_type])
        self._vms.append(vm)
        return vm

    def supported_cpuid(self) -> list[CpuidTuple]:
        return list(CPUID)

    def close(self) -> None:
        while self._vms:
            self._vms.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def as_system(self) -> System:
        """For code that is typed for the real one."""
        return cast(System, self)
