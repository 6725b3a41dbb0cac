"""A vCPU's fd: registers, KVM_RUN, and the answers that an exit needs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kvm_bindings import fdops, ioctls
from kvm_bindings._kvm import ffi, lib
from kvm_bindings.errors import fail
from kvm_bindings.exits import (
    Exit,
    FailEntryExit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    RdmsrExit,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
    WrmsrExit,
)

RegisterValue = int | Mapping[str, int]

_INTERNAL_ERROR_EMULATION = 1
_EMULATION_FLAG_INSTRUCTION_BYTES = 1
_EXIT_REASON_MEMORY_FAULT = 39
_PAGE_SIZE = 4096
_RING_ENTRIES = (_PAGE_SIZE - 8) // 24  # KVM_COALESCED_MMIO_MAX
_EHWPOISON = 133  # Python's errno module names it since 3.14 only

# cffi realises a type at its first use, which has crashed when several threads did it at once.
for _name in ffi.list_types()[1]:
    _ = ffi.typeof(f"struct {_name} *").item.fields


class Vcpu:
    """One vCPU with its mapped kvm_run page. Only one thread may be inside `run`."""

    def __init__(self, fd: int, index: int, mmap_size: int, ring_page: int = 0) -> None:
        """Takes over `fd`, also when mapping it raises KvmError.

        `ring_page` is the page of the mapping that holds the VM's coalesced writes, if any.
        """
        self.fd = fd
        self.index = index
        self._mmap_size = mmap_size
        try:
            self._address = fdops.map_shared(fd, mmap_size)
        except OSError:
            os.close(fd)
            raise
        self._run = ffi.cast("struct kvm_run *", self._address)
        self._page = ffi.buffer(self._run, mmap_size)
        self._io = ffi.addressof(self._run, "io")
        self._io_offset = 0
        self._ring = None
        if ring_page:
            at = self._address + ring_page * _PAGE_SIZE
            self._ring = ffi.cast("struct kvm_coalesced_mmio_ring *", at)
        self._decode: dict[int, Callable[[], Exit]] = {
            2: self._decode_io,
            3: self._decode_hypercall,
            5: HltExit,
            6: self._decode_mmio,
            8: ShutdownExit,
            9: self._decode_fail_entry,
            17: self._decode_internal_error,
            24: self._decode_system_event,
            29: self._decode_rdmsr,
            30: self._decode_wrmsr,
        }

    def close(self) -> None:
        """Unmap kvm_run and close the fd; no thread may be in `run`, and none may enter it."""
        if self.fd >= 0:
            del self._decode, self._page, self._io, self._ring, self._run
            fdops.unmap(self._address, self._mmap_size)
            os.close(self.fd)
            self.fd = -1

    # -- running ------------------------------------------------------------------------------

    def run(self) -> Exit:
        """KVM_RUN: enter the guest until something needs user space; a typed exit.

        EINTR is an exit of its own (InterruptedExit), never retried here: a vCPU must be
        stoppable. Raises KvmError for every other failure that is not a memory fault.
        """
        result = lib.pyvmm_ioctl_value(self.fd, ioctls.KVM_RUN, 0)
        reason = self._run.exit_reason
        if result < 0:
            return self._decode_failure(result, reason)
        decode = self._decode.get(reason)
        return decode() if decode is not None else self._decode_unknown(reason)

    @property
    def immediate_exit(self) -> bool:
        """kvm_run.immediate_exit: while set, KVM_RUN returns EINTR before entering the guest."""
        return bool(self._run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._run.immediate_exit = value

    @property
    def has_coalesced_writes(self) -> bool:
        """Whether port writes wait in the VM's ring; they came before the last exit."""
        ring = self._ring
        return ring is not None and ring.first != ring.last

    def coalesced_writes(self) -> Iterator[IoExit]:
        """The port writes in the ring, oldest first; each is taken out when the next is asked for.

        The ring belongs to the VM: one thread at a time may iterate.
        """
        ring = self._ring
        while ring is not None and ring.first != ring.last:
            write = ring.coalesced_mmio[ring.first % _RING_ENTRIES]
            size = min(write.len, 8)
            yield IoExit(write.phys_addr, size, 1, True, bytes(write.data[0:size]))
            ring.first = (ring.first + 1) % _RING_ENTRIES

    def answer_io(self, data: bytes) -> None:
        """Give the guest the bytes that its port read asked for (the last exit's count * size)."""
        self._page[self._io_offset : self._io_offset + len(data)] = data

    def answer_mmio(self, data: bytes) -> None:
        """Give the guest the bytes that its MMIO read asked for (at most 8)."""
        ffi.memmove(self._run.mmio.data, data, len(data))

    def answer_hypercall(self, result: int) -> None:
        """Set the hypercall's return value: 0, or a negative errno."""
        self._run.hypercall.ret = result & 0xFFFF_FFFF_FFFF_FFFF

    def answer_msr(self, value: int | None, *, known: bool) -> None:
        """Complete an MSR exit: a read's value, or #GP when the MSR isn't `known`."""
        self._run.msr.error = 0 if known else 1
        if value is not None:
            self._run.msr.data = value

    # -- decoding the kvm_run page ------------------------------------------------------------

    def _decode_failure(self, result: int, reason: int) -> Exit:
        number = -result
        if number in (errno.EINTR, errno.EAGAIN):
            return InterruptedExit(number)
        if number in (errno.EFAULT, _EHWPOISON) and reason == _EXIT_REASON_MEMORY_FAULT:
            fault = self._run.memory_fault
            return MemoryFaultExit(fault.flags, fault.gpa, fault.size, number)
        return fail("KVM_RUN", result, f"vcpu={self.index}, exit_reason={reason}")

    def _decode_io(self) -> Exit:
        io = self._io
        size, count = io.size, io.count
        self._io_offset = offset = io.data_offset
        is_write = io.direction == 1
        data = self._page[offset : offset + size * count] if is_write else b""
        return IoExit(io.port, size, count, is_write, data)

    def _decode_mmio(self) -> Exit:
        mmio = self._run.mmio
        size = mmio.len
        data = bytes(mmio.data[0:size]) if mmio.is_write else b""
        return MmioExit(mmio.phys_addr, size, bool(mmio.is_write), data)

    def _decode_hypercall(self) -> Exit:
        call = self._run.hypercall
        a = call.args
        return HypercallExit(call.nr, (a[0], a[1], a[2], a[3], a[4], a[5]), call.flags)

    def _decode_fail_entry(self) -> Exit:
        entry = self._run.fail_entry
        return FailEntryExit(entry.hardware_entry_failure_reason, entry.cpu)

    def _decode_internal_error(self) -> Exit:
        internal = self._run.internal
        count = min(internal.ndata, 16)
        instruction = b""
        if internal.suberror == _INTERNAL_ERROR_EMULATION and count:
            failure = self._run.emulation_failure
            if failure.flags & _EMULATION_FLAG_INSTRUCTION_BYTES:
                instruction = bytes(failure.insn_bytes[0 : min(failure.insn_size, 15)])
        return InternalErrorExit(internal.suberror, tuple(internal.data[0:count]), instruction)

    def _decode_system_event(self) -> Exit:
        event = self._run.system_event
        return SystemEventExit(event.type, tuple(event.data[0 : min(event.ndata, 16)]))

    def _decode_rdmsr(self) -> Exit:
        return RdmsrExit(self._run.msr.index, self._run.msr.reason)

    def _decode_wrmsr(self) -> Exit:
        msr = self._run.msr
        return WrmsrExit(msr.index, msr.data, msr.reason)

    def _decode_unknown(self, reason: int) -> Exit:
        return UnknownExit(reason, bytes(ffi.buffer(self._run.exit_padding)))

    # -- state --------------------------------------------------------------------------------

    def get_regs(self) -> dict[str, int]:
        """KVM_GET_REGS: the kvm_regs fields by name."""
        regs = ffi.new("struct kvm_regs *")
        result = lib.pyvmm_ioctl_pointer(self.fd, ioctls.KVM_GET_REGS, regs)
        if result < 0:
            fail("KVM_GET_REGS", result, f"vcpu={self.index}")
        return {name: getattr(regs, name) for name, _ in ffi.typeof(regs).item.fields}

    def set_regs(self, values: Mapping[str, int]) -> None:
        """KVM_SET_REGS: the kvm_regs fields given by name, zero in all others."""
        regs = ffi.new("struct kvm_regs *", dict(values))
        result = lib.pyvmm_ioctl_pointer(self.fd, ioctls.KVM_SET_REGS, regs)
        if result < 0:
            fail("KVM_SET_REGS", result, f"vcpu={self.index}")

    def _read_sregs(self) -> Any:
        sregs = ffi.new("struct kvm_sregs *")
        result = lib.pyvmm_ioctl_pointer(self.fd, ioctls.KVM_GET_SREGS, sregs)
        if result < 0:
            fail("KVM_GET_SREGS", result, f"vcpu={self.index}")
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
        result = lib.pyvmm_ioctl_pointer(self.fd, ioctls.KVM_SET_SREGS, sregs)
        if result < 0:
            fail("KVM_SET_SREGS", result, f"vcpu={self.index}, {', '.join(values)}")

    def set_cpuid2(self, entries: Iterable[tuple[int, int, int, int, int, int, int]]) -> None:
        """KVM_SET_CPUID2: (function, index, flags, eax, ebx, ecx, edx) of each leaf."""
        leaves = list(entries)
        buffer = ffi.new("char[]", ffi.sizeof("struct kvm_cpuid2") + 40 * len(leaves))
        cpuid = ffi.cast("struct kvm_cpuid2 *", buffer)
        cpuid.nent = len(leaves)
        for index, leaf in enumerate(leaves):
            cpuid.entries[index] = leaf
        result = lib.pyvmm_ioctl_pointer(self.fd, ioctls.KVM_SET_CPUID2, cpuid)
        if result < 0:
            fail("KVM_SET_CPUID2", result, f"vcpu={self.index}, nent={len(leaves)}")

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS: MSR index -> value. Raises KvmError naming the first that KVM refuses."""
        buffer = ffi.new("char[]", ffi.sizeof("struct kvm_msrs") + 16 * len(values))
        msrs = ffi.cast("struct kvm_msrs *", buffer)
        msrs.nmsrs = len(values)
        for entry, (index, value) in zip(
            msrs.entries[0 : len(values)], values.items(), strict=True
        ):
            entry.index, entry.data = index, value
        done = lib.pyvmm_ioctl_pointer(self.fd, ioctls.KVM_SET_MSRS, msrs)
        if 0 <= done < len(values):  # how many it set, in order
            index, value = list(values.items())[done]
            fail("KVM_SET_MSRS", -errno.EINVAL, f"vcpu={self.index}, {index:#x} = {value:#x}")
        if done < 0:
            fail("KVM_SET_MSRS", done, f"vcpu={self.index}")

    def kvmclock_ctrl(self) -> bool:
        """KVM_KVMCLOCK_CTRL: tell the guest through its kvmclock that it was stopped, so that its
        watchdogs don't take the gap for a lock-up. False where it has no such clock.

        Waits for a KVM_RUN that is under way.
        """
        result = lib.pyvmm_ioctl_value(self.fd, ioctls.KVM_KVMCLOCK_CTRL, 0)
        if result < 0 and result not in (-errno.EINVAL, -errno.ENOTTY):
            fail("KVM_KVMCLOCK_CTRL", result, f"vcpu={self.index}")
        return int(result) >= 0

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        """KVM_PRE_FAULT_MEMORY: map a range for the guest now, all at once, without faults later.

        Pages that don't exist yet come into being. Raises KvmError (EOPNOTSUPP: shadow paging;
        ENOTTY before Linux 6.11).
        """
        argument = ffi.new("struct kvm_pre_fault_memory *", {"gpa": gpa, "size": size})
        while argument.size:
            result = lib.pyvmm_ioctl_pointer(self.fd, ioctls.KVM_PRE_FAULT_MEMORY, argument)
            # It reports progress in gpa and size, and a signal or a race may end it early.
            if result < 0 and result not in (-errno.EINTR, -errno.EAGAIN):
                fail("KVM_PRE_FAULT_MEMORY", result, f"{gpa=:#x}, {size=:#x}")
