"""Answers for the model-specific registers that KVM hands to user space."""

from __future__ import annotations

from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

SYSCFG = 0xC001_0010  # AMD APM vol. 2, 3.2.1; bit 23: memory encryption is enabled
SYSCFG_MEM_ENCRYPT = 1 << 23
SEV_STATUS = 0xC001_0131  # APM vol. 2, 15.34.10; bit 0: SEV is active
SEV_ENABLED = 1 << 0
MIGRATION_CONTROL = 0x4B56_4D08  # Documentation/virt/kvm/x86/msr.rst; bit 0: ready
MIGRATION_READY = 1 << 0

MTRR_DEF_TYPE = 0x2FF  # SDM vol. 3, 13.11.2.1; bit 11: MTRRs enabled, bits 7:0: default type
MTRR_ENABLE, MTRR_WRITE_BACK = 1 << 11, 6

LINUX_ENTRY_MSRS = {MTRR_DEF_TYPE: MTRR_ENABLE | MTRR_WRITE_BACK}
"""What firmware leaves behind and Linux relies on: with MTRRs disabled, kernels before 6.2 turn
off PAT too, and a SEV guest then dies for want of write-protected mappings."""


class MsrTable:
    """What an exiting RDMSR reads and which exiting WRMSR succeeds; all else is #GP.

    Linux reads unknown MSRs with a fault handler at hand, so #GP is the honest answer there.
    Without `c_bit` the guest is no SEV guest and nothing is known. `migration_ready` holds what
    the guest wrote to MIGRATION_CONTROL last.
    """

    __slots__ = ("_c_bit", "migration_ready")

    def __init__(self, c_bit: bool) -> None:
        self._c_bit = c_bit
        self.migration_ready = False

    def read(self, index: int) -> int | None:
        """The value, or None when the guest is to get #GP."""
        if not self._c_bit:
            return None
        if index == SEV_STATUS:
            return SEV_ENABLED
        if index == SYSCFG:
            return SYSCFG_MEM_ENCRYPT
        if index == MIGRATION_CONTROL:
            return MIGRATION_READY if self.migration_ready else 0
        return None

    def state(self) -> State:
        """See vmm.core.saved.Stateful."""
        return {"migration_ready": self.migration_ready}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful."""
        self.migration_ready = saved.flag("migration_ready")

    def write(self, index: int, value: int) -> bool:
        """Take a write; False when the guest is to get #GP."""
        if not self._c_bit or index != MIGRATION_CONTROL or value & ~MIGRATION_READY:
            return False
        self.migration_ready = bool(value)
        return True
