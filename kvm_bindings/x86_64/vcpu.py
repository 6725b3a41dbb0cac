"""A vCPU's fd on x86-64: registers, and the exits and answers of ports and MSRs."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence

import kvm_bindings
from kvm_bindings import exits
from kvm_bindings.abi import ffi_for
from kvm_bindings.errors import check, fail
from kvm_bindings.exits import DebugExit, Exit, IoExit, RdmsrExit, WrmsrExit
from kvm_bindings.x86_64 import ioctls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RegisterValue = int | Mapping[str, int]

ffi = ffi_for("x86_64")


class Vcpu(kvm_bindings.Vcpu):
    """One vCPU with its mapped kvm_run page. Only one thread may be inside `run`."""

    def __init__(self, fd: int, index: int, mmap_size: int, ring_page: int = 0) -> None:
        super().__init__(fd, index, mmap_size, ring_page)
        self._io = self._run.io  # a reference into the page
        self._io_offset = 0

    def close(self) -> None:
        if self.fd >= 0:
            del self._io
        super().close()

    def answer_io(self, data: bytes) -> None:
        """Give the guest the bytes that its port read asked for (the last exit's count * size)."""
        self._page[self._io_offset : self._io_offset + len(data)] = data

    def answer_msr(self, value: int | None, *, known: bool) -> None:
        """Complete an MSR exit: a read's value, or #GP when the MSR isn't `known`."""
        self._run.msr.error = 0 if known else 1
        if value is not None:
            self._run.msr.data = value

    # -- decoding the kvm_run page ------------------------------------------------------------

    def _decoders(self) -> dict[int, Callable[[], Exit]]:
        return {
            **super()._decoders(),
            exits.KVM_EXIT_IO: self._decode_io,
            exits.KVM_EXIT_X86_RDMSR: self._decode_rdmsr,
            exits.KVM_EXIT_X86_WRMSR: self._decode_wrmsr,
            exits.KVM_EXIT_DEBUG: self._decode_debug,
        }

    def _decode_io(self) -> Exit:
        io = self._io
        size, count = io.size, io.count
        self._io_offset = offset = io.data_offset
        is_write = io.direction == 1
        data = self._page[offset : offset + size * count] if is_write else b""
        return IoExit(io.port, size, count, is_write, data)

    def _decode_rdmsr(self) -> Exit:
        return RdmsrExit(self._run.msr.index, self._run.msr.reason)

    def _decode_wrmsr(self) -> Exit:
        msr = self._run.msr
        return WrmsrExit(msr.index, msr.data, msr.reason)

    def _decode_debug(self) -> Exit:
        debug = ffi.cast("struct kvm_debug_exit_arch *", ffi.addressof(self._run, "exit_padding"))
        return DebugExit(debug.exception, debug.pc, debug.dr6, debug.dr7)

    # -- state --------------------------------------------------------------------------------

    def get_regs(self) -> dict[str, int]:
        """KVM_GET_REGS: the kvm_regs fields by name."""
        regs = ffi.new("struct kvm_regs *")
        check("KVM_GET_REGS", self._pointer(ioctls.KVM_GET_REGS, regs), "vcpu={}", self.index)
        return {name: getattr(regs, name) for name, _ in ffi.typeof(regs).item.fields}

    def set_regs(self, values: Mapping[str, int]) -> None:
        """KVM_SET_REGS: the kvm_regs fields given by name, zero in all others."""
        regs = ffi.new("struct kvm_regs *", dict(values))
        check("KVM_SET_REGS", self._pointer(ioctls.KVM_SET_REGS, regs), "vcpu={}", self.index)

    def _read_sregs(self) -> Any:
        sregs = ffi.new("struct kvm_sregs *")
        check("KVM_GET_SREGS", self._pointer(ioctls.KVM_GET_SREGS, sregs), "vcpu={}", self.index)
        return sregs

    def update_sregs(self, values: Mapping[str, RegisterValue]) -> None:
        """KVM_GET_SREGS and KVM_SET_SREGS with the named kvm_sregs fields replaced.

        A segment or table is a mapping of its own fields; what isn't named keeps its reset
        value. Raises KvmError (EINVAL: CPUID doesn't allow it, e.g. EFER.LME before CPUID).
        """
        sregs = self._read_sregs()
        for name, value in values.items():
            if isinstance(value, int):
                setattr(sregs, name, value)
                continue
            nested = getattr(sregs, name)
            for field, number in value.items():
                setattr(nested, field, number)
        result = self._pointer(ioctls.KVM_SET_SREGS, sregs)
        check("KVM_SET_SREGS", result, "vcpu={}, {}", self.index, ", ".join(values))

    def get_sregs(self) -> dict[str, int | dict[str, int]]:
        """KVM_GET_SREGS: the kvm_sregs fields by name, a segment's or table's by theirs; without
        interrupt_bitmap."""
        sregs = self._read_sregs()
        values: dict[str, int | dict[str, int]] = {}
        for name, field in ffi.typeof(sregs).item.fields:
            value = getattr(sregs, name)
            if field.type.kind == "struct":
                values[name] = {part: getattr(value, part) for part, _ in field.type.fields}
            elif field.type.kind == "primitive":
                values[name] = value
        return values

    def get_fpu(self) -> bytes:
        """KVM_GET_FPU: struct kvm_fpu, 416 bytes."""
        fpu = ffi.new("struct kvm_fpu *")
        check("KVM_GET_FPU", self._pointer(ioctls.KVM_GET_FPU, fpu), "vcpu={}", self.index)
        return bytes(ffi.buffer(fpu))

    def set_fpu(self, data: bytes) -> None:
        """KVM_SET_FPU: struct kvm_fpu as `get_fpu` gives it."""
        fpu = ffi.new("struct kvm_fpu *")
        ffi.buffer(fpu)[:] = data
        check("KVM_SET_FPU", self._pointer(ioctls.KVM_SET_FPU, fpu), "vcpu={}", self.index)

    def set_guest_debug(self, control: int, debug_registers: Sequence[int] = (0,) * 8) -> None:
        """KVM_SET_GUEST_DEBUG: what makes KVM_RUN return DebugExit from now on; KVM_GUESTDBG_*.

        `debug_registers` are DR0 to DR7, of which KVM takes the four addresses and DR7. Raises
        KvmError (EBUSY: with KVM_GUESTDBG_INJECT_*, an exception is on its way already).
        """
        argument = ffi.new("struct kvm_guest_debug *", {"control": control})
        argument.arch.debugreg = list(debug_registers)
        result = self._pointer(ioctls.KVM_SET_GUEST_DEBUG, argument)
        check("KVM_SET_GUEST_DEBUG", result, "vcpu={}, control={:#x}", self.index, control)

    def set_cpuid2(self, entries: Iterable[tuple[int, int, int, int, int, int, int]]) -> None:
        """KVM_SET_CPUID2: (function, index, flags, eax, ebx, ecx, edx) of each leaf."""
        leaves = list(entries)
        buffer = ffi.new("char[]", ffi.sizeof("struct kvm_cpuid2") + 40 * len(leaves))
        cpuid = ffi.cast("struct kvm_cpuid2 *", buffer)
        cpuid.nent = len(leaves)
        for index, leaf in enumerate(leaves):
            cpuid.entries[index] = leaf
        result = self._pointer(ioctls.KVM_SET_CPUID2, cpuid)
        check("KVM_SET_CPUID2", result, "vcpu={}, nent={}", self.index, len(leaves))

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS: MSR index -> value. Raises KvmError naming the first that KVM refuses."""
        buffer = ffi.new("char[]", ffi.sizeof("struct kvm_msrs") + 16 * len(values))
        msrs = ffi.cast("struct kvm_msrs *", buffer)
        msrs.nmsrs = len(values)
        for entry, (index, value) in zip(
            msrs.entries[0 : len(values)], values.items(), strict=True
        ):
            entry.index, entry.data = index, value
        done = self._pointer(ioctls.KVM_SET_MSRS, msrs)
        check("KVM_SET_MSRS", done, "vcpu={}", self.index)
        if done < len(values):  # how many it set, in order
            index, value = list(values.items())[done]
            fail("KVM_SET_MSRS", -errno.EINVAL, f"vcpu={self.index}, {index:#x} = {value:#x}")

    def kvmclock_ctrl(self) -> bool:
        """KVM_KVMCLOCK_CTRL: tell the guest through its kvmclock that it was stopped, so that its
        watchdogs don't take the gap for a lock-up. False where it has no such clock.

        Waits for a KVM_RUN that is under way.
        """
        result = self._value(ioctls.KVM_KVMCLOCK_CTRL)
        if result in (-errno.EINVAL, -errno.ENOTTY):
            return False
        check("KVM_KVMCLOCK_CTRL", result, "vcpu={}", self.index)
        return True

    # -- state to save and put back, as the kernel's structures --------------------------------

    def _saved(self, name: str, request: int, kind: str) -> bytes:
        state = ffi.new(f"struct {kind} *")
        check(name, self._pointer(request, state), "vcpu={}", self.index)
        return bytes(ffi.buffer(state))

    def _put_back(self, name: str, request: int, kind: str, data: bytes) -> None:
        if len(data) != ffi.sizeof(f"struct {kind}"):
            fail(name, -errno.EINVAL, f"vcpu={self.index}, {len(data)} bytes")
        state = ffi.from_buffer(f"struct {kind} *", data)
        check(name, self._pointer(request, state), "vcpu={}", self.index)

    def save_sregs(self) -> bytes:
        """KVM_GET_SREGS: struct kvm_sregs."""
        return self._saved("KVM_GET_SREGS", ioctls.KVM_GET_SREGS, "kvm_sregs")

    def restore_sregs(self, data: bytes) -> None:
        """KVM_SET_SREGS. Raises KvmError (EINVAL: no processor is in such a state)."""
        self._put_back("KVM_SET_SREGS", ioctls.KVM_SET_SREGS, "kvm_sregs", data)

    def save_sregs2(self) -> bytes:
        """KVM_GET_SREGS2: struct kvm_sregs2, which has the PDPTRs of PAE paging."""
        return self._saved("KVM_GET_SREGS2", ioctls.KVM_GET_SREGS2, "kvm_sregs2")

    def restore_sregs2(self, data: bytes) -> None:
        """KVM_SET_SREGS2, as `restore_sregs`; pending interrupts are KVM_SET_VCPU_EVENTS' here."""
        self._put_back("KVM_SET_SREGS2", ioctls.KVM_SET_SREGS2, "kvm_sregs2", data)

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: the 1 KiB of the local APIC's registers."""
        return self._saved("KVM_GET_LAPIC", ioctls.KVM_GET_LAPIC, "kvm_lapic_state")

    def set_lapic(self, data: bytes) -> None:
        """KVM_SET_LAPIC; the APIC base (KVM_SET_SREGS) comes first."""
        self._put_back("KVM_SET_LAPIC", ioctls.KVM_SET_LAPIC, "kvm_lapic_state", data)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: KVM_MP_STATE_*, 0 for one that runs."""
        data = self._saved("KVM_GET_MP_STATE", ioctls.KVM_GET_MP_STATE, "kvm_mp_state")
        return int.from_bytes(data, "little")

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE. Raises KvmError (EINVAL: no such state)."""
        data = state.to_bytes(4, "little")
        self._put_back("KVM_SET_MP_STATE", ioctls.KVM_SET_MP_STATE, "kvm_mp_state", data)

    def get_vcpu_events(self) -> bytes:
        """KVM_GET_VCPU_EVENTS: struct kvm_vcpu_events: exceptions, interrupts, NMI, SMI."""
        return self._saved("KVM_GET_VCPU_EVENTS", ioctls.KVM_GET_VCPU_EVENTS, "kvm_vcpu_events")

    def set_vcpu_events(self, data: bytes) -> None:
        """KVM_SET_VCPU_EVENTS, what its flags say is valid. Raises KvmError."""
        self._put_back("KVM_SET_VCPU_EVENTS", ioctls.KVM_SET_VCPU_EVENTS, "kvm_vcpu_events", data)

    def get_debugregs(self) -> bytes:
        """KVM_GET_DEBUGREGS: struct kvm_debugregs, the guest's own."""
        return self._saved("KVM_GET_DEBUGREGS", ioctls.KVM_GET_DEBUGREGS, "kvm_debugregs")

    def set_debugregs(self, data: bytes) -> None:
        """KVM_SET_DEBUGREGS. Raises KvmError."""
        self._put_back("KVM_SET_DEBUGREGS", ioctls.KVM_SET_DEBUGREGS, "kvm_debugregs", data)

    def get_xcrs(self) -> bytes:
        """KVM_GET_XCRS: struct kvm_xcrs."""
        return self._saved("KVM_GET_XCRS", ioctls.KVM_GET_XCRS, "kvm_xcrs")

    def set_xcrs(self, data: bytes) -> None:
        """KVM_SET_XCRS. Raises KvmError (EINVAL: CPUID has no such feature)."""
        self._put_back("KVM_SET_XCRS", ioctls.KVM_SET_XCRS, "kvm_xcrs", data)

    def get_xsave(self, size: int = 0) -> bytes:
        """KVM_GET_XSAVE, or with a `size` (KVM_CAP_XSAVE2's) KVM_GET_XSAVE2: the XSAVE area."""
        least: int = ffi.sizeof("struct kvm_xsave")
        area = ffi.new("char[]", max(size, least))
        name, request = ("KVM_GET_XSAVE2", ioctls.KVM_GET_XSAVE2) if size else (
            "KVM_GET_XSAVE", ioctls.KVM_GET_XSAVE)  # fmt: skip
        check(name, self._pointer(request, area), "vcpu={}", self.index)
        return bytes(ffi.buffer(area))

    def set_xsave(self, data: bytes, size: int = 0) -> None:
        """KVM_SET_XSAVE, as `get_xsave` gives it with that `size`. Raises KvmError."""
        if len(data) != max(size, ffi.sizeof("struct kvm_xsave")):  # as much as KVM reads
            fail("KVM_SET_XSAVE", -errno.EINVAL, f"vcpu={self.index}, {len(data)} bytes")
        result = self._pointer(ioctls.KVM_SET_XSAVE, ffi.from_buffer("char[]", data))
        check("KVM_SET_XSAVE", result, "vcpu={}", self.index)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: MSR index -> value, without those that can't be read here."""
        left, found = list(indices), dict[int, int]()
        while left:
            buffer = ffi.new("char[]", ffi.sizeof("struct kvm_msrs") + 16 * len(left))
            msrs = ffi.cast("struct kvm_msrs *", buffer)
            msrs.nmsrs = len(left)
            for entry, index in zip(msrs.entries[0 : len(left)], left, strict=True):
                entry.index = index
            done = check(
                "KVM_GET_MSRS", self._pointer(ioctls.KVM_GET_MSRS, msrs), "vcpu={}", self.index
            )
            found |= {entry.index: entry.data for entry in msrs.entries[0:done]}
            left = left[done + 1 :]  # the first that can't be read ends it
        return found

    def tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the guest's time stamp counter's frequency; 0 where KVM can't say."""
        result = self._value(ioctls.KVM_GET_TSC_KHZ)
        return max(result, 0)

    def set_tsc_khz(self, frequency: int) -> None:
        """KVM_SET_TSC_KHZ. Raises KvmError (EINVAL: this processor can't scale to that)."""
        result = self._value(ioctls.KVM_SET_TSC_KHZ, frequency)
        check("KVM_SET_TSC_KHZ", result, "vcpu={}, {} kHz", self.index, frequency)
