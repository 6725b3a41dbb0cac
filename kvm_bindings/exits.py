"""What KVM_RUN can return, as data. Fields are copied once out of the live kvm_run page.

Source: Documentation/virt/kvm/api.rst section 5 (the kvm_run structure). An exit that this
table doesn't know is `UnknownExit`, not an error.
"""

from __future__ import annotations

from kvm_bindings.record import Record

# kvm_run.exit_reason, for all architectures (include/uapi/linux/kvm.h).
KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_S390_SIEIC = 13
KVM_EXIT_S390_RESET = 14
KVM_EXIT_DCR = 15
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_OSI = 18
KVM_EXIT_PAPR_HCALL = 19
KVM_EXIT_S390_UCONTROL = 20
KVM_EXIT_WATCHDOG = 21
KVM_EXIT_S390_TSCH = 22
KVM_EXIT_EPR = 23
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_S390_STSI = 25
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_HYPERV = 27
KVM_EXIT_ARM_NISV = 28
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_AP_RESET_HOLD = 32
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_XEN = 34
KVM_EXIT_RISCV_SBI = 35
KVM_EXIT_RISCV_CSR = 36
KVM_EXIT_NOTIFY = 37
KVM_EXIT_LOONGARCH_IOCSR = 38
KVM_EXIT_MEMORY_FAULT = 39
KVM_EXIT_TDX = 40
KVM_EXIT_ARM_SEA = 41
KVM_EXIT_ARM_LDST64B = 42
KVM_EXIT_SNP_REQ_CERTS = 43

EXIT_NAMES: dict[int, str] = {
    number: name.removeprefix("KVM_EXIT_").lower()
    for name, number in list(globals().items())
    if name.startswith("KVM_EXIT_")
}
"""What an exit is called in reports, by its number."""


class IoExit(Record):
    """KVM_EXIT_IO: `times` port accesses of `size` bytes, all to the same `port`.

    With times > 1 (string I/O) the data advances, the port does not. For a write `data` holds
    times * size bytes; for a read it is empty and Vcpu.answer_io gives the guest its bytes.
    """

    __slots__ = ("data", "is_write", "port", "size", "times")

    def __init__(self, port: int, size: int, times: int, is_write: bool, data: bytes) -> None:
        self.port = port
        self.size = size
        self.times = times
        self.is_write = is_write
        self.data = data


class MmioExit(Record):
    """KVM_EXIT_MMIO: an access to a GPA without a memslot; reads: Vcpu.answer_mmio."""

    __slots__ = ("data", "gpa", "is_write", "size")

    def __init__(self, gpa: int, size: int, is_write: bool, data: bytes) -> None:
        self.gpa = gpa
        self.size = size
        self.is_write = is_write
        self.data = data


class HypercallExit(Record):
    """KVM_EXIT_HYPERCALL. KVM presets the result to 0: always call Vcpu.answer_hypercall."""

    __slots__ = ("args", "flags", "number")

    def __init__(self, number: int, args: tuple[int, int, int, int, int, int], flags: int) -> None:
        self.number = number
        self.args = args
        self.flags = flags


class MemoryFaultExit(Record):
    """KVM_EXIT_MEMORY_FAULT: KVM_RUN failed with `errno` (EFAULT or EHWPOISON) on this range."""

    __slots__ = ("errno", "flags", "gpa", "size")

    def __init__(self, flags: int, gpa: int, size: int, errno: int) -> None:
        self.flags = flags
        self.gpa = gpa
        self.size = size
        self.errno = errno

    @property
    def private(self) -> bool:
        """KVM_MEMORY_EXIT_FLAG_PRIVATE: the guest meant the private page."""
        return bool(self.flags & (1 << 3))


class ArmNisvExit(Record):
    """KVM_EXIT_ARM_NISV: an access outside all memslots by an instruction that the processor
    doesn't describe (no valid syndrome), so that KVM can't say what it reads or writes.

    `esr_iss` is ESR_EL2's ISS field, `gpa` the address. Only with KVM_CAP_ARM_NISV_TO_USER;
    otherwise KVM_RUN fails with ENOSYS, or the guest of a protected VM is sent an abort.
    """

    __slots__ = ("esr_iss", "gpa")

    def __init__(self, esr_iss: int, gpa: int) -> None:
        self.esr_iss = esr_iss
        self.gpa = gpa


class RdmsrExit(Record):
    """KVM_EXIT_X86_RDMSR: answer with Vcpu.answer_msr."""

    __slots__ = ("msr", "reason")

    def __init__(self, msr: int, reason: int) -> None:
        self.msr = msr
        self.reason = reason


class WrmsrExit(Record):
    """KVM_EXIT_X86_WRMSR: answer with Vcpu.answer_msr."""

    __slots__ = ("msr", "reason", "value")

    def __init__(self, msr: int, value: int, reason: int) -> None:
        self.msr = msr
        self.value = value
        self.reason = reason


class DebugExit(Record):
    """KVM_EXIT_DEBUG on x86: a single step or a breakpoint of Vcpu.set_guest_debug's.

    `exception` is the vector (1: a debug exception, 3: a breakpoint instruction, at which `pc`
    stands), `pc` the linear address of the instruction, `dr6` what the debug exception is about.
    """

    __slots__ = ("dr6", "dr7", "exception", "pc")

    def __init__(self, exception: int, pc: int, dr6: int, dr7: int) -> None:
        self.exception = exception
        self.pc = pc
        self.dr6 = dr6
        self.dr7 = dr7


class ArmDebugExit(Record):
    """KVM_EXIT_DEBUG on arm64: a single step or a breakpoint of Vcpu.set_guest_debug's.

    `syndrome` is ESR_EL2, whose exception class (bits 31:26) says which; the program counter is at
    the instruction. `far` is the address whose access a watchpoint met, else left from before.
    """

    __slots__ = ("far", "syndrome")

    def __init__(self, syndrome: int, far: int) -> None:
        self.syndrome = syndrome
        self.far = far


class SystemEventExit(Record):
    """KVM_EXIT_SYSTEM_EVENT: 1 shutdown, 2 reset, 3 crash, 4 wakeup, 5 suspend, 6 SEV."""

    __slots__ = ("data", "type")

    def __init__(self, type: int, data: tuple[int, ...]) -> None:
        self.type = type
        self.data = data


class ShutdownExit(Record):
    """KVM_EXIT_SHUTDOWN: a triple fault."""

    __slots__ = ()


class HltExit(Record):
    """KVM_EXIT_HLT: only without an in-kernel interrupt controller."""

    __slots__ = ()


class FailEntryExit(Record):
    """KVM_EXIT_FAIL_ENTRY: the hardware refused the vCPU's state."""

    __slots__ = ("cpu", "hardware_reason")

    def __init__(self, hardware_reason: int, cpu: int) -> None:
        self.hardware_reason = hardware_reason
        self.cpu = cpu


class InternalErrorExit(Record):
    """KVM_EXIT_INTERNAL_ERROR; suberror 1 is a failed emulation, with the instruction's bytes
    where KVM gives them (empty otherwise)."""

    __slots__ = ("data", "instruction", "suberror")

    def __init__(self, suberror: int, data: tuple[int, ...], instruction: bytes) -> None:
        self.suberror = suberror
        self.data = data
        self.instruction = instruction


class InterruptedExit(Record):
    """KVM_RUN returned without an exit: a signal or immediate_exit (EINTR), or an application
    processor was taken out of "uninitialised" (EAGAIN). Run again, unless asked to stop."""

    __slots__ = ("errno",)

    def __init__(self, errno: int) -> None:
        self.errno = errno


class UnknownExit(Record):
    """An exit reason that has no class here; `raw` is the exit union (256 bytes)."""

    __slots__ = ("raw", "reason")

    def __init__(self, reason: int, raw: bytes) -> None:
        self.reason = reason
        self.raw = raw

    @property
    def name(self) -> str:
        return EXIT_NAMES.get(self.reason, f"exit {self.reason}")


Exit = (
    IoExit
    | MmioExit
    | HypercallExit
    | MemoryFaultExit
    | ArmNisvExit
    | RdmsrExit
    | WrmsrExit
    | DebugExit
    | ArmDebugExit
    | SystemEventExit
    | ShutdownExit
    | HltExit
    | FailEntryExit
    | InternalErrorExit
    | InterruptedExit
    | UnknownExit
)
