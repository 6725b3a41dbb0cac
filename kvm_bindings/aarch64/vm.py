"""A VM's fd on arm64."""

from __future__ import annotations

import kvm_bindings
from kvm_bindings.aarch64 import ioctls
from kvm_bindings.aarch64.vcpu import Vcpu
from kvm_bindings.abi import ffi_for
from kvm_bindings.errors import check

ffi = ffi_for("aarch64")


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
