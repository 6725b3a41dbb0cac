"""/dev/kvm on x86-64: the CPUID that it can give a guest."""

from __future__ import annotations

import kvm_bindings
from kvm_bindings.abi import ffi_for
from kvm_bindings.errors import check
from kvm_bindings.x86_64 import ioctls
from kvm_bindings.x86_64.vm import Vm

CpuidTuple = tuple[int, int, int, int, int, int, int]

_CPUID_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES
_MSRS = 4096

ffi = ffi_for("x86_64")


class System(kvm_bindings.System):
    """The KVM subsystem: an open /dev/kvm."""

    def create_vm(self, vm_type: int = 0) -> Vm:
        return Vm(*self._create_vm(vm_type))

    def supported_cpuid(self) -> list[CpuidTuple]:
        """KVM_GET_SUPPORTED_CPUID: (function, index, flags, eax, ebx, ecx, edx) of each leaf."""
        buffer = ffi.new("char[]", ffi.sizeof("struct kvm_cpuid2") + 40 * _CPUID_ENTRIES)
        cpuid = ffi.cast("struct kvm_cpuid2 *", buffer)
        cpuid.nent = _CPUID_ENTRIES
        result = self._pointer(ioctls.KVM_GET_SUPPORTED_CPUID, cpuid)
        check("KVM_GET_SUPPORTED_CPUID", result, "nent={}", _CPUID_ENTRIES)
        entries = (cpuid.entries[i] for i in range(cpuid.nent))
        return [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries]

    def msr_indices(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs that are a vCPU's state, besides those of its own."""
        buffer = ffi.new("char[]", ffi.sizeof("struct kvm_msr_list") + 4 * _MSRS)
        found = ffi.cast("struct kvm_msr_list *", buffer)
        found.nmsrs = _MSRS
        result = self._pointer(ioctls.KVM_GET_MSR_INDEX_LIST, found)
        check("KVM_GET_MSR_INDEX_LIST", result, "nmsrs={}", _MSRS)
        return [found.indices[i] for i in range(found.nmsrs)]
