"""A vCPU's fd on arm64: how it comes to life, and the exit that only it has."""

from __future__ import annotations

from collections.abc import Callable

import kvm_bindings
from kvm_bindings import exits
from kvm_bindings.aarch64 import ioctls
from kvm_bindings.abi import ffi_for
from kvm_bindings.errors import check

ffi = ffi_for("aarch64")


class Vcpu(kvm_bindings.Vcpu):
    """One vCPU with its mapped kvm_run page. Only one thread may be inside `run`."""

    def init(self, target: int, *features: int) -> None:
        """KVM_ARM_VCPU_INIT: reset the vCPU, with the KVM_ARM_VCPU_ features of these numbers.

        `target` is Vm.preferred_target's. All vCPUs of a VM take the same features, but for
        POWER_OFF. Raises KvmError (EINVAL: a feature that this host or VM type doesn't have).
        """
        argument = ffi.new("struct kvm_vcpu_init *", {"target": target})
        for feature in features:
            argument.features[feature // 32] |= 1 << feature % 32
        result = self._pointer(ioctls.KVM_ARM_VCPU_INIT, argument)
        text = "vcpu={}, target={}, features={}"
        check("KVM_ARM_VCPU_INIT", result, text, self.index, target, features)

    def _decoders(self) -> dict[int, Callable[[], exits.Exit]]:
        return {**super()._decoders(), exits.KVM_EXIT_ARM_NISV: self._decode_nisv}

    def _decode_nisv(self) -> exits.Exit:
        nisv = self._run.arm_nisv
        return exits.ArmNisvExit(nisv.esr_iss, nisv.fault_ipa)
