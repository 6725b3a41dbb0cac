"""A VM's fd on arm64."""

from __future__ import annotations

import struct

import kvm_bindings
from kvm_bindings import ioctls as common
from kvm_bindings.aarch64 import ioctls
from kvm_bindings.aarch64.vcpu import Vcpu
from kvm_bindings.abi import ffi_for
from kvm_bindings.errors import check

ffi = ffi_for("aarch64")

_SMCCC_FILTER = struct.Struct("<IIB15x")  # struct kvm_smccc_filter: base, nr_functions, action


class Vm(kvm_bindings.Vm):
    """One VM. Close it after its vCPUs."""

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU: the id becomes the affinity in MPIDR_EL1. Vcpu.init makes it run."""
        return Vcpu(*self._create_vcpu(vcpu_id))

    def preferred_target(self) -> int:
        """KVM_ARM_PREFERRED_TARGET: the processor type that Vcpu.init wants."""
        argument = ffi.new("struct kvm_vcpu_init *")
        result = self._pointer(ioctls.KVM_ARM_PREFERRED_TARGET, argument)
        check("KVM_ARM_PREFERRED_TARGET", result)
        return int(argument.target)

    def filter_smccc(self, first_function: int, functions: int, action: int) -> None:
        """KVM_SET_DEVICE_ATTR, KVM_ARM_VM_SMCCC_FILTER: what becomes of the guest's calls by HVC
        and SMC with these function numbers, a KVM_SMCCC_FILTER_ action.

        Raises KvmError (EBUSY: a vCPU has run; EEXIST: filtered already; EINVAL: a protected VM).
        """
        data = ffi.new("uint8_t[]", _SMCCC_FILTER.pack(first_function, functions, action))
        argument = ffi.new(
            "struct kvm_device_attr *",
            {
                "group": ioctls.KVM_ARM_VM_SMCCC_CTRL,
                "attr": ioctls.KVM_ARM_VM_SMCCC_FILTER,
                "addr": data,
            },
        )
        check(
            "KVM_SET_DEVICE_ATTR",
            self._pointer(common.KVM_SET_DEVICE_ATTR, argument),
            "SMCCC filter, base={:#x}, functions={}, action={}",
            *(first_function, functions, action),
        )
