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
