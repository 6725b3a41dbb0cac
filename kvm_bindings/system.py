"""/dev/kvm itself."""

from __future__ import annotations

import errno
import os

from kvm_bindings import ioctls
from kvm_bindings._kvm import ffi, lib
from kvm_bindings.errors import fail
from kvm_bindings.owned_fd import OwnedFd
from kvm_bindings.vm import Vm

CpuidTuple = tuple[int, int, int, int, int, int, int]

_CPUID_ENTRIES = 256  # KVM_MAX_CPUID_ENTRIES


class System(OwnedFd):
    """The KVM subsystem: an open /dev/kvm."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Opens the device. Raises OSError as open(2) does (ENOENT, EACCES...)."""
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 on every kernel since 2.6.22."""
        result = int(lib.pyvmm_ioctl_value(self.fd, ioctls.KVM_GET_API_VERSION, 0))
        if result < 0:
            fail("KVM_GET_API_VERSION", result)
        return result

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the system: 0 when absent."""
        result = int(lib.pyvmm_ioctl_value(self.fd, ioctls.KVM_CHECK_EXTENSION, capability))
        if result < 0:
            fail("KVM_CHECK_EXTENSION", result, f"{capability}")
        return result

    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of a vCPU's shared kvm_run mapping."""
        result = int(lib.pyvmm_ioctl_value(self.fd, ioctls.KVM_GET_VCPU_MMAP_SIZE, 0))
        if result < 0:
            fail("KVM_GET_VCPU_MMAP_SIZE", result)
        return result

    def create_vm(self, vm_type: int = 0) -> Vm:
        """KVM_CREATE_VM. Raises KvmError (EINVAL: no such VM type here)."""
        vcpu_mmap_size = self.vcpu_mmap_size()
        while True:
            result = int(lib.pyvmm_ioctl_value(self.fd, ioctls.KVM_CREATE_VM, vm_type))
            if result != -errno.EINTR:
                break
        if result < 0:
            fail("KVM_CREATE_VM", result, f"type={vm_type}")
        return Vm(result, vcpu_mmap_size)

    def supported_cpuid(self) -> list[CpuidTuple]:
        """KVM_GET_SUPPORTED_CPUID: (function, index, flags, eax, ebx, ecx, edx) of each leaf."""
        buffer = ffi.new("char[]", ffi.sizeof("struct kvm_cpuid2") + 40 * _CPUID_ENTRIES)
        cpuid = ffi.cast("struct kvm_cpuid2 *", buffer)
        cpuid.nent = _CPUID_ENTRIES
        result = lib.pyvmm_ioctl_pointer(self.fd, ioctls.KVM_GET_SUPPORTED_CPUID, cpuid)
        if result < 0:
            fail("KVM_GET_SUPPORTED_CPUID", result, f"nent={_CPUID_ENTRIES}")
        entries = (cpuid.entries[i] for i in range(cpuid.nent))
        return [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries]
