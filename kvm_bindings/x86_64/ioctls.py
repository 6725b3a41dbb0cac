"""The requests, capabilities and flags that only x86 has; the rest is in kvm_bindings.ioctls.

Source: include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

from kvm_bindings import requests
from kvm_bindings.abi import ffi_for

_size = ffi_for("x86_64").sizeof

# On /dev/kvm (System).
KVM_GET_MSR_INDEX_LIST = requests.both(0x02, _size("struct kvm_msr_list"))  # basic
KVM_GET_SUPPORTED_CPUID = requests.both(0x05, _size("struct kvm_cpuid2"))  # KVM_CAP_EXT_CPUID

# On a VM (Vm).
KVM_SET_TSS_ADDR = requests.none(0x47)  # KVM_CAP_SET_TSS_ADDR
KVM_SET_IDENTITY_MAP_ADDR = requests.write(0x48, _size("uint64_t"))  # KVM_CAP_SET_IDENTITY_MAP_ADDR
KVM_CREATE_IRQCHIP = requests.none(0x60)  # KVM_CAP_IRQCHIP
KVM_GET_IRQCHIP = requests.both(0x62, _size("struct kvm_irqchip"))  # KVM_CAP_IRQCHIP
KVM_SET_IRQCHIP = requests.read(0x63, _size("struct kvm_irqchip"))  # KVM_CAP_IRQCHIP; not write
KVM_CREATE_PIT2 = requests.write(0x77, _size("struct kvm_pit_config"))  # KVM_CAP_PIT2
KVM_SET_CLOCK = requests.write(0x7B, _size("struct kvm_clock_data"))  # KVM_CAP_ADJUST_CLOCK
KVM_GET_CLOCK = requests.read(0x7C, _size("struct kvm_clock_data"))  # KVM_CAP_ADJUST_CLOCK
KVM_GET_PIT2 = requests.read(0x9F, _size("struct kvm_pit_state2"))  # KVM_CAP_PIT_STATE2
KVM_SET_PIT2 = requests.write(0xA0, _size("struct kvm_pit_state2"))  # KVM_CAP_PIT_STATE2

# On a vCPU (Vcpu).
KVM_GET_REGS = requests.read(0x81, _size("struct kvm_regs"))  # basic
KVM_SET_REGS = requests.write(0x82, _size("struct kvm_regs"))  # basic
KVM_GET_SREGS = requests.read(0x83, _size("struct kvm_sregs"))  # basic
KVM_SET_SREGS = requests.write(0x84, _size("struct kvm_sregs"))  # basic
KVM_GET_MSRS = requests.both(0x88, _size("struct kvm_msrs"))  # basic
KVM_SET_MSRS = requests.write(0x89, _size("struct kvm_msrs"))  # basic
KVM_GET_FPU = requests.read(0x8C, _size("struct kvm_fpu"))  # basic
KVM_SET_FPU = requests.write(0x8D, _size("struct kvm_fpu"))  # basic
KVM_GET_LAPIC = requests.read(0x8E, _size("struct kvm_lapic_state"))  # KVM_CAP_IRQCHIP
KVM_SET_LAPIC = requests.write(0x8F, _size("struct kvm_lapic_state"))  # KVM_CAP_IRQCHIP
KVM_SET_CPUID2 = requests.write(0x90, _size("struct kvm_cpuid2"))  # KVM_CAP_EXT_CPUID
KVM_GET_MP_STATE = requests.read(0x98, _size("struct kvm_mp_state"))  # KVM_CAP_MP_STATE
KVM_SET_MP_STATE = requests.write(0x99, _size("struct kvm_mp_state"))  # KVM_CAP_MP_STATE
KVM_SET_GUEST_DEBUG = requests.write(
    0x9B, _size("struct kvm_guest_debug")
)  # KVM_CAP_SET_GUEST_DEBUG
KVM_GET_VCPU_EVENTS = requests.read(0x9F, _size("struct kvm_vcpu_events"))  # KVM_CAP_VCPU_EVENTS
KVM_SET_VCPU_EVENTS = requests.write(0xA0, _size("struct kvm_vcpu_events"))  # KVM_CAP_VCPU_EVENTS
KVM_GET_DEBUGREGS = requests.read(0xA1, _size("struct kvm_debugregs"))  # KVM_CAP_DEBUGREGS
KVM_SET_DEBUGREGS = requests.write(0xA2, _size("struct kvm_debugregs"))  # KVM_CAP_DEBUGREGS
KVM_SET_TSC_KHZ = requests.none(0xA2)  # KVM_CAP_TSC_CONTROL
KVM_GET_TSC_KHZ = requests.none(0xA3)  # KVM_CAP_GET_TSC_KHZ
KVM_GET_XSAVE = requests.read(0xA4, _size("struct kvm_xsave"))  # KVM_CAP_XSAVE
KVM_SET_XSAVE = requests.write(0xA5, _size("struct kvm_xsave"))  # KVM_CAP_XSAVE
KVM_GET_XCRS = requests.read(0xA6, _size("struct kvm_xcrs"))  # KVM_CAP_XCRS
KVM_SET_XCRS = requests.write(0xA7, _size("struct kvm_xcrs"))  # KVM_CAP_XCRS
KVM_KVMCLOCK_CTRL = requests.none(0xAD)  # KVM_CAP_KVMCLOCK_CTRL
KVM_GET_SREGS2 = requests.read(0xCC, _size("struct kvm_sregs2"))  # KVM_CAP_SREGS2
KVM_SET_SREGS2 = requests.write(0xCD, _size("struct kvm_sregs2"))  # KVM_CAP_SREGS2
KVM_GET_XSAVE2 = requests.read(0xCF, _size("struct kvm_xsave"))  # KVM_CAP_XSAVE2

# Capabilities (KVM_CHECK_EXTENSION, KVM_ENABLE_CAP).
KVM_CAP_EXT_CPUID = 7
KVM_CAP_PIT2 = 33
KVM_CAP_PIT_STATE2 = 35
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_DEBUGREGS = 50
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_X86_USER_SPACE_MSR = 188
KVM_CAP_SREGS2 = 200
KVM_CAP_EXIT_HYPERCALL = 201
KVM_CAP_XSAVE2 = 208  # answers with the bytes of KVM_GET_XSAVE2

# Flags and small numbers that go with them.
KVM_X86_DEFAULT_VM = 0
KVM_X86_SW_PROTECTED_VM = 1
KVM_IRQCHIPS = 3  # two 8259s and the IOAPIC
KVM_CLOCK_REALTIME = 1 << 2  # in struct kvm_clock_data: its realtime says something
KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2
KVM_GUESTDBG_USE_SW_BP = 1 << 16
KVM_GUESTDBG_USE_HW_BP = 1 << 17
KVM_GUESTDBG_INJECT_DB = 1 << 18
KVM_GUESTDBG_INJECT_BP = 1 << 19
KVM_GUESTDBG_BLOCKIRQ = 1 << 20  # Linux 5.16: no interrupt is delivered during a single step
