"""What KVM_RUN can return, as data. Fields are copied once out of the live kvm_run page.

Source: Documentation/virt/kvm/api.rst section 5 (the kvm_run structure). An exit that this
table doesn't know is `UnknownExit`, not an error.
"""

from __future__ import annotations

from typing import NamedTuple

EXIT_NAMES = {
    0: "unknown", 1: "exception", 2: "io", 3: "hypercall", 4: "debug", 5: "hlt", 6: "mmio",
    7: "irq_window_open", 8: "shutdown", 9: "fail_entry", 10: "intr", 11: "set_tpr",
    12: "tpr_access", 16: "nmi", 17: "internal_error", 18: "osi", 24: "system_event",
    26: "ioapic_eoi", 27: "hyperv", 29: "x86_rdmsr", 30: "x86_wrmsr", 31: "dirty_ring_full",
    32: "ap_reset_hold", 33: "x86_bus_lock", 34: "xen", 37: "notify", 39: "memory_fault",
    40: "tdx",
}  # fmt: skip


class _Bare:
    """An exit without fields: equal to every other of its class."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return other.__class__ is self.__class__

    def __hash__(self) -> int:
        return hash(self.__class__)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}()"


class IoExit(NamedTuple):
    """KVM_EXIT_IO: `times` port accesses of `size` bytes, all to the same `port`.

    With times > 1 (string I/O) the data advances, the port does not. For a write `data` holds
    times * size bytes; for a read it is empty and Vcpu.answer_io gives the guest its bytes.
    """

    port: int
    size: int
    times: int
    is_write: bool
    data: bytes


class MmioExit(NamedTuple):
    """KVM_EXIT_MMIO: an access to a GPA without a memslot; reads: Vcpu.answer_mmio."""

    gpa: int
    size: int
    is_write: bool
    data: bytes


class HypercallExit(NamedTuple):
    """KVM_EXIT_HYPERCALL. KVM presets the result to 0: always call Vcpu.answer_hypercall."""

    number: int
    args: tuple[int, int, int, int, int, int]
    flags: int


class MemoryFaultExit(NamedTuple):
    """KVM_EXIT_MEMORY_FAULT: KVM_RUN failed with `errno` (EFAULT or EHWPOISON) on this range."""

    flags: int
    gpa: int
    size: int
    errno: int

    @property
    def private(self) -> bool:
        """KVM_MEMORY_EXIT_FLAG_PRIVATE: the guest meant the private page."""
        return bool(self.flags & (1 << 3))


class RdmsrExit(NamedTuple):
    """KVM_EXIT_X86_RDMSR: answer with Vcpu.answer_msr."""

    msr: int
    reason: int


class WrmsrExit(NamedTuple):
    """KVM_EXIT_X86_WRMSR: answer with Vcpu.answer_msr."""

    msr: int
    value: int
    reason: int


class SystemEventExit(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT: 1 shutdown, 2 reset, 3 crash, 4 wakeup, 5 suspend, 6 SEV."""

    type: int
    data: tuple[int, ...]


class ShutdownExit(_Bare):
    """KVM_EXIT_SHUTDOWN: a triple fault."""


class HltExit(_Bare):
    """KVM_EXIT_HLT: only without an in-kernel interrupt controller."""


class FailEntryExit(NamedTuple):
    """KVM_EXIT_FAIL_ENTRY: the hardware refused the vCPU's state."""

    hardware_reason: int
    cpu: int


class InternalErrorExit(NamedTuple):
    """KVM_EXIT_INTERNAL_ERROR; suberror 1 is a failed emulation, with the instruction's bytes
    where KVM gives them (empty otherwise)."""

    suberror: int
    data: tuple[int, ...]
    instruction: bytes


class InterruptedExit(NamedTuple):
    """KVM_RUN returned without an exit: a signal or immediate_exit (EINTR), or an application
    processor was taken out of "uninitialised" (EAGAIN). Run again, unless asked to stop."""

    errno: int


class UnknownExit(NamedTuple):
    """An exit reason that has no class here; `raw` is the exit union (256 bytes)."""

    reason: int
    raw: bytes

    @property
    def name(self) -> str:
        return EXIT_NAMES.get(self.reason, f"exit {self.reason}")


Exit = (
    IoExit
    | MmioExit
    | HypercallExit
    | MemoryFaultExit
    | RdmsrExit
    | WrmsrExit
    | SystemEventExit
    | ShutdownExit
    | HltExit
    | FailEntryExit
    | InternalErrorExit
    | InterruptedExit
    | UnknownExit
)
