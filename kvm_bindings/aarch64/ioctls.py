"""The requests, capabilities and flags that only arm64 has; the rest is in kvm_bindings.ioctls.

Source: include/uapi/linux/kvm.h, arch/arm64/include/uapi/asm/kvm.h,
Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic-its.rst.
"""

from __future__ import annotations

from kvm_bindings import requests
from kvm_bindings.abi import ffi_for

_size = ffi_for("aarch64").sizeof

# On a VM (Vm).
KVM_ARM_PREFERRED_TARGET = requests.read(0xAF, _size("struct kvm_vcpu_init"))  # basic

# On a vCPU (Vcpu).
KVM_SET_GUEST_DEBUG = requests.write(
    0x9B, _size("struct kvm_guest_debug")
)  # KVM_CAP_SET_GUEST_DEBUG
KVM_ARM_VCPU_INIT = requests.write(0xAE, _size("struct kvm_vcpu_init"))  # basic

# Capabilities (KVM_CHECK_EXTENSION, KVM_ENABLE_CAP).
KVM_CAP_ARM_PSCI_0_2 = 102
KVM_CAP_GUEST_DEBUG_HW_BPS = 119  # answers with their number
KVM_CAP_GUEST_DEBUG_HW_WPS = 120  # answers with their number
KVM_CAP_ARM_PMU_V3 = 126
KVM_CAP_ARM_VM_IPA_SIZE = 165
KVM_CAP_ARM_SVE = 170
KVM_CAP_ARM_PTRAUTH_ADDRESS = 171
KVM_CAP_ARM_PTRAUTH_GENERIC = 172
KVM_CAP_ARM_NISV_TO_USER = 177
KVM_CAP_ARM_SYSTEM_SUSPEND = 216

# Groups, attributes and structures of a VM itself (Documentation/virt/kvm/devices/vm.rst).
KVM_ARM_VM_SMCCC_CTRL = 0
KVM_ARM_VM_SMCCC_FILTER = 0  # struct kvm_smccc_filter, before any vCPU has run
KVM_SMCCC_FILTER_HANDLE = 0
KVM_SMCCC_FILTER_DENY = 1
KVM_SMCCC_FILTER_FWD_TO_USER = 2  # KVM_EXIT_HYPERCALL

# VM types: bits of KVM_CREATE_VM's argument. IPA bits 0: 40, as ever.
KVM_VM_TYPE_ARM_IPA_SIZE_MASK = 0xFF
KVM_VM_TYPE_ARM_PROTECTED = 1 << 31  # on a host with kvm-arm.mode=protected

# Features of a vCPU: bit numbers in kvm_vcpu_init.features.
KVM_ARM_VCPU_POWER_OFF = 0
KVM_ARM_VCPU_EL1_32BIT = 1
KVM_ARM_VCPU_PSCI_0_2 = 2
KVM_ARM_VCPU_PMU_V3 = 3
KVM_ARM_VCPU_SVE = 4
KVM_ARM_VCPU_PTRAUTH_ADDRESS = 5
KVM_ARM_VCPU_PTRAUTH_GENERIC = 6
KVM_ARM_VCPU_HAS_EL2 = 7

# What Vcpu.set_guest_debug takes, beside kvm_bindings.ioctls' flags.
KVM_GUESTDBG_USE_SW_BP = 1 << 16
KVM_GUESTDBG_USE_HW = 1 << 17
KVM_ARM_MAX_DBG_REGS = 16

# Devices (Vm.create_device), and the groups and attributes of the vGICv3 and its ITS.
KVM_DEV_TYPE_ARM_VGIC_V3 = 7
KVM_DEV_TYPE_ARM_VGIC_ITS = 8
KVM_DEV_ARM_VGIC_GRP_ADDR = 0
KVM_VGIC_V3_ADDR_TYPE_DIST = 2  # a GPA, 64 KiB
KVM_VGIC_V3_ADDR_TYPE_REDIST = 3  # a GPA, 128 KiB per vCPU
KVM_VGIC_ITS_ADDR_TYPE = 4  # a GPA, 128 KiB; on the ITS
KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION = 5  # count in bits 63:52, GPA in 51:16, index in 11:0
KVM_DEV_ARM_VGIC_GRP_NR_IRQS = 3  # attribute 0; with the 32 private ones, 64 to 1024 in steps of 32
KVM_DEV_ARM_VGIC_GRP_CTRL = 4
KVM_DEV_ARM_VGIC_CTRL_INIT = 0
KVM_DEV_ARM_ITS_CTRL_RESET = 4
KVM_VGIC_V3_DIST_SIZE = 0x1_0000
KVM_VGIC_V3_REDIST_SIZE = 0x2_0000
KVM_VGIC_V3_ITS_SIZE = 0x2_0000
