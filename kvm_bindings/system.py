"""/dev/kvm itself."""

from __future__ import annotations

import os

from kvm_bindings import ioctls
from kvm_bindings.errors import check
from kvm_bindings.owned_fd import OwnedFd
from kvm_bindings.vm import Vm


class System(OwnedFd):
    """The KVM subsystem: an open /dev/kvm."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Opens the device. Raises OSError as open(2) does (ENOENT, EACCES...)."""
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 on every kernel since 2.6.22."""
        return check("KVM_GET_API_VERSION", self._value(ioctls.KVM_GET_API_VERSION))

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the system: 0 when absent."""
        result = self._value(ioctls.KVM_CHECK_EXTENSION, capability)
        return check("KVM_CHECK_EXTENSION", result, "{}", capability)

    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of a vCPU's shared kvm_run mapping."""
        return check("KVM_GET_VCPU_MMAP_SIZE", self._value(ioctls.KVM_GET_VCPU_MMAP_SIZE))

    def create_vm(self, vm_type: int = 0) -> Vm:
        """KVM_CREATE_VM. Raises KvmError (EINVAL: no such VM type here)."""
        return Vm(*self._create_vm(vm_type))

    def _create_vm(self, vm_type: int) -> tuple[int, int]:
        """What a Vm is made of, for each architecture's own."""
        vcpu_mmap_size = self.vcpu_mmap_size()
        result = self._value(ioctls.KVM_CREATE_VM, vm_type)
        return check("KVM_CREATE_VM", result, "type={}", vm_type), vcpu_mmap_size
