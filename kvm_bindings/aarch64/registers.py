"""Ids of arm64 registers, for Vcpu.get_one_reg and set_one_reg.

Source: Documentation/virt/kvm/api.rst (KVM_SET_ONE_REG), arch/arm64/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

KVM_REG_ARM64 = 0x6000_0000_0000_0000
KVM_REG_SIZE_U32 = 0x0020_0000_0000_0000
KVM_REG_SIZE_U64 = 0x0030_0000_0000_0000
KVM_REG_SIZE_U128 = 0x0040_0000_0000_0000
KVM_REG_ARM_CORE = 0x0010 << 16
KVM_REG_ARM64_SYSREG = 0x0013 << 16

# struct kvm_regs begins with struct user_pt_regs, 64 bits each; an id counts 32-bit words.
CORE_REGISTERS = {
    name: KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | 2 * position
    for position, name in enumerate([*(f"x{number}" for number in range(31)), "sp", "pc", "pstate"])
}
"""The ids of x0 to x30, sp (that of EL0), pc and pstate."""

# What follows them in struct kvm_regs: two of EL1's, five saved program states, then, aligned to
# its 128-bit registers, struct user_fpsimd_state.
_AFTER = 2 * len(CORE_REGISTERS)
_VECTORS = 84
EL1_REGISTERS = {
    name: KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | _AFTER + 2 * position
    for position, name in enumerate(["sp_el1", "elr_el1", "spsr_el1"])
}
"""The ids of EL1's stack pointer, return address and saved program state."""
VECTOR_REGISTERS = {
    **{
        f"v{number}": KVM_REG_ARM64 | KVM_REG_SIZE_U128 | KVM_REG_ARM_CORE | _VECTORS + 4 * number
        for number in range(32)
    },
    "fpsr": KVM_REG_ARM64 | KVM_REG_SIZE_U32 | KVM_REG_ARM_CORE | _VECTORS + 4 * 32,
    "fpcr": KVM_REG_ARM64 | KVM_REG_SIZE_U32 | KVM_REG_ARM_CORE | _VECTORS + 4 * 32 + 1,
}
"""The ids of v0 to v31 (of a vCPU without SVE), fpsr and fpcr."""


def system_register(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The id of a system register by its encoding; MPIDR_EL1 is (3, 0, 0, 0, 5)."""
    encoding = op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | encoding


SYSTEM_REGISTERS = {
    "MDSCR_EL1": system_register(2, 0, 0, 2, 2),
    "MPIDR_EL1": system_register(3, 0, 0, 0, 5),
    "SCTLR_EL1": system_register(3, 0, 1, 0, 0),
    "TTBR0_EL1": system_register(3, 0, 2, 0, 0),
    "TTBR1_EL1": system_register(3, 0, 2, 0, 1),
    "TCR_EL1": system_register(3, 0, 2, 0, 2),
    "ESR_EL1": system_register(3, 0, 5, 2, 0),
    "FAR_EL1": system_register(3, 0, 6, 0, 0),
    "MAIR_EL1": system_register(3, 0, 10, 2, 0),
    "VBAR_EL1": system_register(3, 0, 12, 0, 0),
    "CONTEXTIDR_EL1": system_register(3, 0, 13, 0, 1),
    "TPIDR_EL1": system_register(3, 0, 13, 0, 4),
    "TPIDR_EL0": system_register(3, 3, 13, 0, 2),
}
"""Of EL1 and EL0, by the names and encodings of Arm ARM D19.2."""
