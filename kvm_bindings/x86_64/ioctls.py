"""The requests, capabilities and flags that only x86 has; the rest is in kvm_bindings.ioctls.

Source: include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

from kvm_bindings import requests
from kvm_bindings.abi import ffi_for

_size = ffi_for("x86_64").sizeof

# On /dev/kvm (System).
KVM_GET_SUPPORTED_CPUID = requests.both(0x05, _size("struct kvm_cpuid2"))  # KVM_CAP_EXT_CPUID

# On a VM (Vm).
KVM_SET_TSS_ADDR = requests.none(0x47)  # KVM_CAP_SET_TSS_ADDR
KVM_SET_IDENTITY_MAP_ADDR = requests.write(0x48, _size("uint64_t"))  # KVM_CAP_SET_IDENTITY_MAP_ADDR
KVM_CREATE_IRQCHIP = requests.none(0x60)  # KVM_CAP_IRQCHIP
KVM_CREATE_PIT2 = requests.write(0x77, _size("struct kvm_pit_config"))  # KVM_CAP_PIT2

# On a vCPU (Vcpu).
KVM_GET_REGS = requests.read(0x81, _size("struct kvm_regs"))  # basic
KVM_SET_REGS = requests.write(0x82, _size("struct kvm_regs"))  # basic
KVM_GET_SREGS = requests.read(0x83, _size("struct kvm_sregs"))  # basic
KVM_SET_SREGS = requests.write(0x84, _size("struct kvm_sregs"))  # basic
KVM_SET_MSRS = requests.write(0x89, _size("struct kvm_msrs"))  # basic
KVM_GET_FPU = requests.read(0x8C, _size("struct kvm_fpu"))  # basic
KVM_SET_FPU = requests.write(0x8D, _size("struct kvm_fpu"))  # basic
KVM_SET_CPUID2 = requests.write(0x90, _size("struct kvm_cpuid2"))  # KVM_CAP_EXT_CPUID
KVM_SET_GUEST_DEBUG = requests.write(
    0x9B, _size("struct kvm_guest_debug")
)  # KVM_CAP_SET_GUEST_DEBUG
KVM_KVMCLOCK_CTRL = requests.none(0xAD)  # KVM_CAP_KVMCLOCK_CTRL

# Capabilities (KVM_CHECK_EXTENSION, KVM_ENABLE_CAP).
KVM_CAP_EXT_CPUID = 7
KVM_CAP_SET_GUEST_DEBUG = 23
KVM_CAP_PIT2 = 33
KVM_CAP_X86_USER_SPACE_MSR = 188
KVM_CAP_SET_GUEST_DEBUG2 = 195  # answers with the flags of KVM_SET_GUEST_DEBUG that it knows
KVM_CAP_EXIT_HYPERCALL = 201

# Flags and small numbers that go with them.
KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1
KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2
KVM_GUESTDBG_ENABLE = 1 << 0
KVM_GUESTDBG_SINGLESTEP = 1 << 1
KVM_GUESTDBG_USE_SW_BP = 1 << 16
KVM_GUESTDBG_USE_HW_BP = 1 << 17
KVM_GUESTDBG_INJECT_DB = 1 << 18
KVM_GUESTDBG_INJECT_BP = 1 << 19
KVM_GUESTDBG_BLOCKIRQ = 1 << 20  # Linux 5.16: no interrupt is delivered during a single step
