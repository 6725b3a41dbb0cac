"""A vCPU's fd: registers, KVM_RUN, and the answers that an exit needs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from kvm_bindings import exits, fdops, ioctls
from kvm_bindings._kvm import ffi, lib
from kvm_bindings.errors import check, fail
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
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
)
from kvm_bindings.owned_fd import OwnedFd

_INTERNAL_ERROR_EMULATION = 1
_EMULATION_FLAG_INSTRUCTION_BYTES = 1
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_MOST_RACES = 100
"""How often in a row KVM_PRE_FAULT_MEMORY may come to nothing."""
_RING_ENTRIES = (_PAGE_SIZE - 8) // 24  # KVM_COALESCED_MMIO_MAX
_EHWPOISON = 133  # Python's errno module names it since 3.14 only

# cffi realises a type at its first use, which has crashed when several threads did it at once.
for _name in ffi.list_types()[1]:
    _ = ffi.typeof(f"struct {_name} *").item.fields


def _register_size(register: int) -> int:
    """Bytes of a register, from its id."""
    return 1 << ((register & ioctls.KVM_REG_SIZE_MASK) >> ioctls.KVM_REG_SIZE_SHIFT)


def interrupt_by(number: int) -> None:
    """From now on the signal makes KVM_RUN, and any other call that waits, end with EINTR, and does
    nothing else: a handler in C, which needs no main thread. Raises KvmError."""
    check(f"sigaction({number})", lib.pyvmm_interrupt_by(number))


class Vcpu(OwnedFd):
    """One vCPU with its mapped kvm_run page. Only one thread may be inside `run`."""

    def __init__(self, fd: int, index: int, mmap_size: int, ring_page: int = 0) -> None:
        """Takes over `fd`, also when mapping it raises KvmError.

        `ring_page` is the page of the mapping that holds the VM's coalesced writes, if any.
        """
        super().__init__(fd)
        self.index = index
        self._mmap_size = mmap_size
        try:
            self._address = fdops.map_shared(fd, mmap_size)
        except OSError:
            os.close(fd)
            raise
        self._run = ffi.cast("struct kvm_run *", self._address)
        self._page = ffi.buffer(self._run, mmap_size)
        self._ring = None
        if ring_page:
            at = self._address + ring_page * _PAGE_SIZE
            self._ring = ffi.cast("struct kvm_coalesced_mmio_ring *", at)
        self._decode = self._decoders()

    def _decoders(self) -> dict[int, Callable[[], Exit]]:
        """What makes an exit of each reason; an architecture adds its own."""
        return {
            exits.KVM_EXIT_HYPERCALL: self._decode_hypercall,
            exits.KVM_EXIT_HLT: HltExit,
            exits.KVM_EXIT_MMIO: self._decode_mmio,
            exits.KVM_EXIT_SHUTDOWN: ShutdownExit,
            exits.KVM_EXIT_FAIL_ENTRY: self._decode_fail_entry,
            exits.KVM_EXIT_INTERNAL_ERROR: self._decode_internal_error,
            exits.KVM_EXIT_SYSTEM_EVENT: self._decode_system_event,
        }

    def close(self) -> None:
        """Unmap kvm_run and close the fd; no thread may be in `run`, and none may enter it."""
        if self.fd >= 0:
            del self._decode, self._page, self._ring, self._run
            fdops.unmap(self._address, self._mmap_size)
            os.close(self.fd)
            self.fd = -1

    # -- running ------------------------------------------------------------------------------

    def run(self) -> Exit:
        """KVM_RUN: enter the guest until something needs user space; a typed exit.

        EINTR is an exit of its own (InterruptedExit), never retried here: a vCPU must be
        stoppable. Raises KvmError for every other failure that is not a memory fault.
        """
        # As directly as it goes: once for every exit.
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
        """Whether writes wait in the VM's ring; they came before the last exit."""
        ring = self._ring
        return ring is not None and ring.first != ring.last

    @property
    def oldest_coalesced_write(self) -> int | None:
        """The place in the ring of the write that has waited longest; None if none waits."""
        ring = self._ring
        if ring is None or ring.first == ring.last:
            return None
        return int(ring.first)

    def coalesced_writes(self) -> Iterator[MmioExit | IoExit]:
        """The writes in the ring, oldest first; each is taken out when the next is asked for.

        Bytes for one port that follow one another come as one exit, like those of string I/O.
        What another vCPU adds meanwhile is left for its own exit, so that this has an end. The
        ring belongs to the VM: one thread at a time may iterate.
        """
        ring = self._ring
        if ring is None:
            return
        at, end = ring.first % _RING_ENTRIES, ring.last % _RING_ENTRIES
        while at != end:
            write = ring.coalesced_mmio[at]
            size = min(write.len, 8)
            data = bytes(write.data[0:size])
            at = (at + 1) % _RING_ENTRIES
            if write.pio:
                port = write.phys_addr
                while size == 1 and at != end:
                    following = ring.coalesced_mmio[at]
                    if (following.phys_addr, following.len, following.pio) != (port, 1, 1):
                        break
                    data += bytes(following.data[0:1])
                    at = (at + 1) % _RING_ENTRIES
                yield IoExit(port, size, len(data) if size == 1 else 1, True, data)
            else:
                yield MmioExit(write.phys_addr, size, True, data)
            ring.first = at

    def answer_mmio(self, data: bytes) -> None:
        """Give the guest the bytes that its MMIO read asked for (at most 8)."""
        ffi.memmove(self._run.mmio.data, data, len(data))

    def answer_hypercall(self, result: int) -> None:
        """Set the hypercall's return value: 0, or a negative errno."""
        self._run.hypercall.ret = result & 0xFFFF_FFFF_FFFF_FFFF

    # -- decoding the kvm_run page ------------------------------------------------------------

    def _decode_failure(self, result: int, reason: int) -> Exit:
        number = -result
        if number in (errno.EINTR, errno.EAGAIN):
            return InterruptedExit(number)
        if number in (errno.EFAULT, _EHWPOISON) and reason == exits.KVM_EXIT_MEMORY_FAULT:
            fault = self._run.memory_fault
            return MemoryFaultExit(fault.flags, fault.gpa, fault.size, number)
        return fail("KVM_RUN", result, f"vcpu={self.index}, exit_reason={reason}")

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

    def _decode_unknown(self, reason: int) -> Exit:
        return UnknownExit(reason, bytes(ffi.buffer(self._run.exit_padding)))

    # -- state --------------------------------------------------------------------------------

    def get_one_reg(self, register: int) -> int:
        """KVM_GET_ONE_REG: the register's value; its size is part of the id.

        Raises KvmError (ENOENT: no such register here; EPERM: not before the vCPU is initialised).
        """
        value = ffi.new("uint8_t[]", _register_size(register))
        argument = ffi.new("struct kvm_one_reg *", {"id": register, "addr": value})
        result = self._pointer(ioctls.KVM_GET_ONE_REG, argument)
        check("KVM_GET_ONE_REG", result, "vcpu={}, id={:#x}", self.index, register)
        return int.from_bytes(bytes(value), "little")

    def set_one_reg(self, register: int, value: int) -> None:
        """KVM_SET_ONE_REG, as `get_one_reg`. Raises OverflowError for a value too large for it."""
        data = ffi.new("uint8_t[]", value.to_bytes(_register_size(register), "little"))
        argument = ffi.new("struct kvm_one_reg *", {"id": register, "addr": data})
        result = self._pointer(ioctls.KVM_SET_ONE_REG, argument)
        check(
            "KVM_SET_ONE_REG",
            result,
            "vcpu={}, id={:#x}, value={:#x}",
            *(self.index, register, value),
        )

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        """KVM_PRE_FAULT_MEMORY: map a range for the guest now, all at once, without faults later.

        Pages that don't exist yet come into being. Raises KvmError (EOPNOTSUPP: shadow paging;
        ENOTTY before Linux 6.11).
        """
        argument = ffi.new("struct kvm_pre_fault_memory *", {"gpa": gpa, "size": size})
        in_vain = 0
        while argument.size:
            left = argument.size
            result = self._pointer(ioctls.KVM_PRE_FAULT_MEMORY, argument)
            # It reports progress in gpa and size, and a signal or a race may end it early.
            in_vain = 0 if argument.size < left else in_vain + 1
            if result != -errno.EAGAIN or in_vain == _MOST_RACES:
                check("KVM_PRE_FAULT_MEMORY", result, "gpa={:#x}, size={:#x}", gpa, size)
