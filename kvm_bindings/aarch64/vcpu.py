"""A vCPU's fd on arm64: how it comes to life, and the exit that only it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    def set_guest_debug(
        self,
        control: int,
        breakpoints: Sequence[tuple[int, int]] = (),
        watchpoints: Sequence[tuple[int, int]] = (),
    ) -> None:
        """KVM_SET_GUEST_DEBUG: what makes KVM_RUN return ArmDebugExit from now on; KVM_GUESTDBG_*.

        With any of them the guest's own breakpoint instructions come as such exits, too. The
        sequences are DBGBCR and DBGBVR, DBGWCR and DBGWVR in pairs, as many as the capabilities
        KVM_CAP_GUEST_DEBUG_HW_BPS and _WPS say; KVM takes them as they are. Raises KvmError.
        """
        argument = ffi.new("struct kvm_guest_debug *", {"control": control})
        registers = argument.arch
        for number, (each, value) in enumerate(breakpoints):
            registers.dbg_bcr[number], registers.dbg_bvr[number] = each, value
        for number, (each, value) in enumerate(watchpoints):
            registers.dbg_wcr[number], registers.dbg_wvr[number] = each, value
        result = self._pointer(ioctls.KVM_SET_GUEST_DEBUG, argument)
        check("KVM_SET_GUEST_DEBUG", result, "vcpu={}, control={:#x}", self.index, control)

    def _decoders(self) -> dict[int, Callable[[], exits.Exit]]:
        return {
            **super()._decoders(),
            exits.KVM_EXIT_ARM_NISV: self._decode_nisv,
            exits.KVM_EXIT_DEBUG: self._decode_debug,
        }

    def _decode_nisv(self) -> exits.Exit:
        nisv = self._run.arm_nisv
        return exits.ArmNisvExit(nisv.esr_iss, nisv.fault_ipa)

    def _decode_debug(self) -> exits.Exit:
        debug = ffi.cast("struct kvm_debug_exit_arch *", ffi.addressof(self._run, "exit_padding"))
        # hsr_high, which not every kernel has, is for other exceptions.
        return exits.ArmDebugExit(debug.hsr, debug.far)
