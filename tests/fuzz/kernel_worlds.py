"""Carries a program out on a KVM and writes down what could be seen, call by call.

The same code drives the real kernel and the model; they differ in how a guest accesses memory
and in who answers the host's file operations on a guest_memfd.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import Protocol, cast

from kvm_bindings import GuestMemfd, KvmError, Vm, fdops, ioctls
from kvm_bindings.exits import MemoryFaultExit, MmioExit
from tests.fuzz import kernel_ops as ops
from tests.support.fake_kvm import FakeKernel, FakeVm, VmType
from tests.support.fake_kvm.kernel import INIT_SHARED, MMAP, PRIVATE
from tests.support.fake_platform import FakePlatform
from tests.support.x86 import X86
from vmm.arch.guest_cpu import CODE_SIZE, WORD, Gate, GuestCpu, GuestStopped
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.selftest.platform import KvmPlatform, Platform

AREA_GPA = CODE_SIZE


class Files(Protocol):
    """The host's file operations on a guest_memfd. All raise OSError."""

    def pread(self, gmem: GuestMemfd, size: int, offset: int) -> bytes: ...
    def pwrite(self, gmem: GuestMemfd, data: bytes, offset: int) -> None: ...
    def vm_pread(self, vm: Vm, size: int, gpa: int) -> bytes: ...
    def vm_pwrite(self, vm: Vm, data: bytes, gpa: int) -> None: ...
    def map(self, gmem: GuestMemfd) -> None: ...
    def load(self, gmem: GuestMemfd, size: int, offset: int) -> bytes: ...
    def store(self, gmem: GuestMemfd, data: bytes, offset: int) -> None: ...
    def fallocate(self, gmem: GuestMemfd, mode: int, offset: int, size: int) -> None: ...
    def resident(self, gmem: GuestMemfd) -> int: ...
    def close(self, gmem: GuestMemfd) -> None: ...


class KernelFiles:
    """The kernel's own."""

    def __init__(self, opened: ExitStack) -> None:
        self._scratch = os.memfd_create("scratch")
        opened.callback(os.close, self._scratch)
        self._mappings: dict[int, tuple[int, int]] = {}
        opened.callback(self._unmap_all)

    def pread(self, gmem: GuestMemfd, size: int, offset: int) -> bytes:
        return os.pread(gmem.fd, size, offset)

    def pwrite(self, gmem: GuestMemfd, data: bytes, offset: int) -> None:
        os.pwrite(gmem.fd, data, offset)

    def vm_pread(self, vm: Vm, size: int, gpa: int) -> bytes:
        return os.pread(vm.fd, size, gpa)

    def vm_pwrite(self, vm: Vm, data: bytes, gpa: int) -> None:
        os.pwrite(vm.fd, data, gpa)

    def map(self, gmem: GuestMemfd) -> None:
        self._address(gmem)

    def load(self, gmem: GuestMemfd, size: int, offset: int) -> bytes:
        fdops.pwrite_from_address(self._scratch, self._address(gmem) + offset, size, 0)
        return os.pread(self._scratch, size, 0)

    def store(self, gmem: GuestMemfd, data: bytes, offset: int) -> None:
        os.pwrite(self._scratch, data, 0)
        fdops.pread_to_address(self._scratch, self._address(gmem) + offset, len(data), 0)

    def fallocate(self, gmem: GuestMemfd, mode: int, offset: int, size: int) -> None:
        fdops.fallocate(gmem.fd, mode, offset, size)

    def resident(self, gmem: GuestMemfd) -> int:
        return fdops.cached_pages(gmem.fd)

    def close(self, gmem: GuestMemfd) -> None:
        self._unmap(gmem.fd)
        gmem.close()

    def _address(self, gmem: GuestMemfd) -> int:
        if gmem.fd not in self._mappings:
            # More than there is: what lies past the end is out of reach for everybody.
            size = 2 * ops.GMEM_PAGES * PAGE_SIZE
            self._mappings[gmem.fd] = (fdops.map_shared(gmem.fd, size), size)
        return self._mappings[gmem.fd][0]

    def _unmap(self, fd: int) -> None:
        if fd in self._mappings:
            fdops.unmap(*self._mappings.pop(fd))

    def _unmap_all(self) -> None:
        for fd in list(self._mappings):
            self._unmap(fd)


class ModelFiles:
    """The model's answers."""

    def __init__(self, vm: Vm) -> None:
        self._vm = cast(FakeVm, vm)

    def pread(self, gmem: GuestMemfd, size: int, offset: int) -> bytes:
        return self._vm.guest_memfd(gmem.fd).host_pread(size, offset)

    def pwrite(self, gmem: GuestMemfd, data: bytes, offset: int) -> None:
        self._vm.guest_memfd(gmem.fd).host_pwrite(data, offset)

    def vm_pread(self, vm: Vm, size: int, gpa: int) -> bytes:
        return self._vm.host_pread(size, gpa)

    def vm_pwrite(self, vm: Vm, data: bytes, gpa: int) -> None:
        self._vm.host_pwrite(data, gpa)

    def map(self, gmem: GuestMemfd) -> None:
        self._vm.guest_memfd(gmem.fd).host_map()

    def load(self, gmem: GuestMemfd, size: int, offset: int) -> bytes:
        self.map(gmem)
        return self._vm.guest_memfd(gmem.fd).host_load(size, offset)

    def store(self, gmem: GuestMemfd, data: bytes, offset: int) -> None:
        self.map(gmem)
        self._vm.guest_memfd(gmem.fd).host_store(data, offset)

    def fallocate(self, gmem: GuestMemfd, mode: int, offset: int, size: int) -> None:
        self._vm.guest_memfd(gmem.fd).host_fallocate(mode, offset, size)

    def resident(self, gmem: GuestMemfd) -> int:
        return self._vm.guest_memfd(gmem.fd).host_resident_pages()

    def close(self, gmem: GuestMemfd) -> None:
        gmem.close()


class World:
    """A VM under test."""

    def __init__(self, platform: Platform, vm_type: int) -> None:
        with ExitStack() as opened:
            self._vm: Vm = opened.enter_context(platform.system.create_vm(vm_type))
            size = ops.PAGES * PAGE_SIZE
            self._memfd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
            opened.callback(os.close, self._memfd)
            os.ftruncate(self._memfd, size)
            mapped = 2 * size  # a slot that starts anywhere in the memfd ends in the mapping
            self._hva = fdops.map_shared(self._memfd, mapped)
            opened.callback(fdops.unmap, self._hva, mapped)
            area = [Range(AREA_GPA, size)]
            self._guest: GuestCpu = platform.guests(opened, self._vm, 1, area, 0, Gate())[0]
            self._files: Files = (
                KernelFiles(opened) if isinstance(platform, KvmPlatform) else ModelFiles(self._vm)
            )
            self._gmems: list[GuestMemfd] = []
            opened.callback(self._close_all)
            self._opened = opened.pop_all()

    def run(self, program: ops.Program) -> list[str]:
        """Everything seen, one line for each operation."""
        with self._opened:
            return [self._observe(op) for op in program]

    def _observe(self, op: ops.Op) -> str:
        try:
            result = self._carry_out(op)
        except GuestStopped as stop:
            return _describe(stop)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno))
        return "ok" if result is None else str(result)

    def _carry_out(self, op: ops.Op) -> object:
        match op:
            case ops.CreateGuestMemfd(size, flags):
                if len(self._gmems) < ops.GUEST_MEMFDS:
                    self._gmems.append(self._vm.create_guest_memfd(size, flags))
            case ops.SetSlot():
                self._set_slot(op)
            case ops.SetAttributes(gpa, size, attributes):
                self._vm.set_memory_attributes(AREA_GPA + gpa, size, attributes)
            case ops.VmIo("pread", page, _):
                return _hex(self._files.vm_pread(self._vm, WORD, AREA_GPA + page * PAGE_SIZE))
            case ops.VmIo(_, page, word):
                data = word.to_bytes(WORD, "little")
                self._files.vm_pwrite(self._vm, data, AREA_GPA + page * PAGE_SIZE)
            case ops.HostRead(page):
                return _hex(os.pread(self._memfd, WORD, page * PAGE_SIZE))
            case ops.HostWrite(page, word):
                os.pwrite(self._memfd, word.to_bytes(WORD, "little"), page * PAGE_SIZE)
            case ops.GuestRead(page):
                return f"{self._guest.read(AREA_GPA + page * PAGE_SIZE):#x}"
            case ops.GuestWrite(page, word):
                self._guest.write(AREA_GPA + page * PAGE_SIZE, word)
            case _:
                return self._on_guest_memfd(op)
        return None

    def _set_slot(self, op: ops.SetSlot) -> None:
        gpa, hva = AREA_GPA + op.gpa, self._hva + op.hva
        if op.old_ioctl:
            self._vm.set_user_memory_region(op.number, gpa, op.size, hva, op.flags)
            return
        fd = self._memfd
        if op.guest_memfd >= 0:
            gmem = self._gmem(op.guest_memfd)
            fd = -1 if gmem is None else gmem.fd
        self._vm.set_user_memory_region2(
            op.number, gpa, op.size, hva, fd & 0xFFFF_FFFF, op.offset, op.flags
        )

    def _gmem(self, index: int) -> GuestMemfd | None:
        """The guest_memfd with that index, if it was made and is open."""
        if index >= len(self._gmems) or self._gmems[index].fd < 0:
            return None
        return self._gmems[index]

    def _on_guest_memfd(self, op: ops.Op) -> object:
        kinds = ops.Fallocate | ops.GuestMemfdIo | ops.CloseGuestMemfd | ops.ConvertInPlace
        assert isinstance(op, kinds)
        gmem = self._gmem(op.guest_memfd)
        if gmem is None:
            return "not there"
        files = self._files
        match op:
            case ops.Fallocate(_, mode, offset, size):
                files.fallocate(gmem, mode, offset, size)
            case ops.CloseGuestMemfd():
                files.close(gmem)
            case ops.ConvertInPlace(_, offset, size, attributes):
                gmem.set_memory_attributes2(offset, size, attributes)
            case ops.GuestMemfdIo(_, "pwrite", offset, word):
                files.pwrite(gmem, word.to_bytes(WORD, "little"), offset)
            case ops.GuestMemfdIo(_, "pread", offset, _):
                return _hex(files.pread(gmem, WORD, offset))
            case ops.GuestMemfdIo(_, "map", _, _):
                files.map(gmem)
            case ops.GuestMemfdIo(_, "load", offset, _):
                return _hex(files.load(gmem, WORD, offset))
            case ops.GuestMemfdIo(_, "store", offset, word):
                files.store(gmem, word.to_bytes(WORD, "little"), offset)
            case ops.GuestMemfdIo(_, "resident", _, _):
                return files.resident(gmem)
        return None

    def _close_all(self) -> None:
        for gmem in self._gmems:
            if gmem.fd >= 0:
                self._files.close(gmem)


def _hex(data: bytes) -> str:
    return f"{int.from_bytes(data, 'little'):#x}"


def _describe(stop: GuestStopped) -> str:
    exit = stop.exit
    if isinstance(exit, MemoryFaultExit):
        gpa = exit.gpa - AREA_GPA
        return f"memory fault, flags={exit.flags}, gpa=+{gpa:#x}, size={exit.size}, {exit.errno}"
    if isinstance(exit, MmioExit):
        return (
            f"mmio, gpa=+{exit.gpa - AREA_GPA:#x}, {exit.size}, {exit.is_write}, {exit.data.hex()}"
        )
    return f"{exit}"


def model_of(platform: Platform) -> FakePlatform:
    """A model with the VM types, flags and errnos that a platform's KVM has."""
    types: dict[int, VmType] = {}
    model = FakeKernel(types)
    for number in X86.vm_types:
        try:
            vm = platform.system.create_vm(number)
        except KvmError:
            continue
        with vm:
            types[number] = VmType(
                vm.check_extension(ioctls.KVM_CAP_MEMORY_ATTRIBUTES),
                vm.check_extension(ioctls.KVM_CAP_GUEST_MEMFD_FLAGS),
            )
            model.attributes_ioctl |= _has_attributes_ioctl(vm)
            _model_experiments(model, vm, number)
            model.memslots = vm.check_extension(ioctls.KVM_CAP_NR_MEMSLOTS)
            model.binding_taken = _binding_taken(vm)
    return FakePlatform(model)


def _model_experiments(model: FakeKernel, vm: Vm, vm_type: int) -> None:
    """What no released kernel has: by trying."""
    flags = model.vm_types[vm_type].guest_memfd_flags & (MMAP | INIT_SHARED)
    with vm.create_guest_memfd(PAGE_SIZE, flags) as gmem:
        if flags & INIT_SHARED:
            model.file_io = gmem.has_file_io()
        try:
            os.pread(vm.fd, 1, 0)
        except OSError as error:
            model.vm_io = error.errno == errno.EFAULT
        try:
            gmem.set_memory_attributes2(0, PAGE_SIZE, 0)
        except KvmError as error:
            model.in_place = error.errno != errno.ENOTTY
            return
        model.in_place = True
        try:
            if model.file_io:
                os.pwrite(gmem.fd, b"x", 0)
            gmem.set_memory_attributes2(0, PAGE_SIZE, PRIVATE)
        except KvmError:
            return
        model.vm_types[vm_type] = VmType(PRIVATE, flags)
        gmem.set_memory_attributes2(0, PAGE_SIZE, 0)
        model.keeps_content = model.file_io and os.pread(gmem.fd, 1, 0) == b"x"


def _has_attributes_ioctl(vm: Vm) -> bool:
    try:
        vm.set_memory_attributes(0, PAGE_SIZE, 0)
    except KvmError as error:
        return error.errno != errno.ENOTTY
    return True


def _binding_taken(vm: Vm) -> int:
    """What a second slot for the same range of a guest_memfd meets: the kernels differ."""
    with vm.create_guest_memfd(PAGE_SIZE) as gmem:
        try:
            for slot in range(2):
                vm.set_user_memory_region2(slot, slot * PAGE_SIZE, PAGE_SIZE, 0, gmem.fd, 0)
        except KvmError as error:
            return error.errno or 0
    return 0
