"""/dev/kvm on arm64."""

from __future__ import annotations

import kvm_bindings
from kvm_bindings.aarch64.vm import Vm


class System(kvm_bindings.System):
    """The KVM subsystem: an open /dev/kvm."""

    def create_vm(self, vm_type: int = 0) -> Vm:
        """KVM_CREATE_VM: `vm_type` is the number of guest-physical address bits (0: 40), with
        KVM_VM_TYPE_ARM_PROTECTED for a protected VM. Raises KvmError (EINVAL: not here)."""
        return Vm(*self._create_vm(vm_type))
