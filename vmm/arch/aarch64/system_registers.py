"""System registers of EL1 and EL0 by the names that the Arm ARM gives them.

The ids are made from the encodings in Arm ARM D19.2 (each register's "Accessing").
"""

from __future__ import annotations

from kvm_bindings.aarch64.registers import system_register

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
"""The ids for Vcpu.get_one_reg and set_one_reg."""
