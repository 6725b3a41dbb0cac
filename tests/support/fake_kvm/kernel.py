"""What a modelled kernel offers, and the one gate that every modelled ioctl goes through."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kvm_bindings import KvmError, ioctls

DEFAULT_VM, SW_PROTECTED_VM = 0, 1
MMAP, INIT_SHARED = ioctls.GUEST_MEMFD_FLAG_MMAP, ioctls.GUEST_MEMFD_FLAG_INIT_SHARED
PRIVATE = ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE


@dataclass(frozen=True)
class VmType:
    """`attributes`: those that pages may have; `guest_memfd_flags`: those at creation."""

    attributes: int
    guest_memfd_flags: int


@dataclass
class _Injection:
    operation: str | None
    number: int
    skip: int
    times: int


@dataclass
class FakeKernel:
    """`attributes_ioctl`: whether KVM_SET_MEMORY_ATTRIBUTES exists at all (it depends on the
    kernel's configuration, not on the VM's type). `in_place`: attributes belong to guest_memfds
    instead of VMs, and the per-VM ioctl is gone."""

    vm_types: dict[int, VmType] = field(
        default_factory=lambda: {DEFAULT_VM: VmType(0, MMAP | INIT_SHARED)}
    )
    attributes_ioctl: bool = False
    in_place: bool = False
    file_io: bool = False
    """Whether guest_memfds can be read and written by their fds, and VMs by theirs (`vm_io`)."""
    vm_io: bool = False
    keeps_content: bool = False
    """Whether a page's bytes outlive a conversion in place: nobody may count on either."""
    pre_fault: bool = True
    memslots: int = 32764
    binding_taken: int = errno.EINVAL
    """The errno for a guest_memfd's range that another slot has: EEXIST in Linux 7.3."""
    calls: Counter[str] = field(default_factory=Counter)
    watch: Callable[[str], None] = lambda operation: None
    """Called ahead of every ioctl; what it raises comes out of the ioctl."""
    _injections: list[_Injection] = field(default_factory=list)

    @classmethod
    def sw_protected(cls) -> FakeKernel:
        """A kernel with CONFIG_KVM_SW_PROTECTED_VM."""
        types = {DEFAULT_VM: VmType(0, MMAP | INIT_SHARED), SW_PROTECTED_VM: VmType(PRIVATE, MMAP)}
        return cls(types, attributes_ioctl=True)

    @classmethod
    def with_in_place(cls) -> FakeKernel:
        """The same with in-place conversion, in which INIT_SHARED serves every VM type."""
        flags = MMAP | INIT_SHARED
        types = {DEFAULT_VM: VmType(0, flags), SW_PROTECTED_VM: VmType(PRIVATE, flags)}
        return cls(types, in_place=True)

    def inject(self, operation: str | None, number: int, *, skip: int = 0, times: int = 1) -> None:
        """Let `operation` (None: any) fail `times` times with the errno, after `skip` calls."""
        self._injections.append(_Injection(operation, number, skip, times))

    def clear_injections(self) -> None:
        self._injections.clear()

    def enter(self, operation: str, arguments: str = "") -> None:
        """Count a call. Raises KvmError where an error was injected."""
        self.calls[operation] += 1
        self.watch(operation)
        for injection in self._injections:
            if injection.operation not in (None, operation) or not injection.times:
                continue
            if injection.skip:
                injection.skip -= 1
                continue
            injection.times -= 1
            raise KvmError(operation, injection.number, arguments, "injected")


def refuse(operation: str, number: int, arguments: str = "") -> KvmError:
    """What a modelled ioctl raises."""
    return KvmError(operation, number, arguments)


EINVAL, EEXIST, ENOTTY, EBADF, EFAULT = (
    errno.EINVAL,
    errno.EEXIST,
    errno.ENOTTY,
    errno.EBADF,
    errno.EFAULT,
)
