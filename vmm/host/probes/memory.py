"""What stands behind guest memory: VM types, memslots, guest_memfd and its flags."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvm_bindings import KvmError, System, fdops, ioctls
from vmm.host.probes.finding import Finding, broken, no, yes
from vmm.host.probes.micro_guest import (
    AREA_SIZE,
    WORD_AT,
    MicroGuest,
    Verb,
    mapped,
    memory_file,
    seen,
)

if TYPE_CHECKING:
    from vmm.host.architecture import HostArchitecture

_MMAP = ioctls.GUEST_MEMFD_FLAG_MMAP
_INIT_SHARED = ioctls.GUEST_MEMFD_FLAG_INIT_SHARED
FLAG_NAMES = {
    0: "no flags",
    _MMAP: "MMAP",
    _INIT_SHARED: "INIT_SHARED",
    _MMAP | _INIT_SHARED: "MMAP|INIT_SHARED",
}

_GUEST_WORD, _MARKER, _HOST_WORD = 0x5453_4547, 0x444D_454D, 0x5453_4F48


def vm_types(architecture: HostArchitecture, system: System) -> Finding:
    """Which VM types can be created."""
    made: dict[str, dict[str, int]] = {}
    refused = []
    for number, name in architecture.vm_types.items():
        try:
            with system.create_vm(number) as vm:
                made[name] = {
                    "attributes": vm.check_extension(ioctls.KVM_CAP_MEMORY_ATTRIBUTES),
                    "guest_memfd_flags": vm.check_extension(ioctls.KVM_CAP_GUEST_MEMFD_FLAGS),
                }
        except KvmError as error:
            refused.append(f"{name} {errno.errorcode.get(error.errno or 0, error.errno)}")
    mask = system.check_extension(ioctls.KVM_CAP_VM_TYPES)
    evidence = f"KVM_CAP_VM_TYPES = {mask:#x}; KVM_CREATE_VM refused {', '.join(refused) or 'none'}"
    if set(made) <= {"default"}:
        return no("default only" if made else "none", evidence, types=made)
    return yes(", ".join(made), evidence, types=made)


def memslots(system: System) -> Finding:
    """How many memslots a VM takes, the last of them tried."""
    with system.create_vm() as vm, ExitStack() as opened:
        count = vm.check_extension(ioctls.KVM_CAP_NR_MEMSLOTS)
        memory = mapped(opened, memory_file(opened, AREA_SIZE), AREA_SIZE)
        vm.set_user_memory_region(count - 1, 0, AREA_SIZE, memory)
    return yes(f"{count}", f"KVM_CAP_NR_MEMSLOTS = {count}; slot {count - 1} taken", count=count)


def guest_memfd(architecture: HostArchitecture, flags: int, system: System) -> Finding:
    """Everything about a guest_memfd created with `flags`, on a default VM."""
    with (
        ExitStack() as opened,
        architecture.micro_guest(system, Verb.EXCHANGE, word=_GUEST_WORD) as guest,
    ):
        offered = guest.vm.check_extension(ioctls.KVM_CAP_GUEST_MEMFD_FLAGS)
        word = f"KVM_CAP_GUEST_MEMFD_FLAGS = {offered:#x}"
        try:
            created = guest.vm.create_guest_memfd(AREA_SIZE, flags)
        except KvmError as error:
            return no("refused", f"{word}; {error}", created=False)
        opened.callback(created.close)
        try:
            examination = _Examination(opened, guest, created.fd)
        except KvmError as error:  # arm64 (7.3) takes none without MMAP
            return no("no use to a VM", f"{word}; created, but {error}", created=True)
        return examination.finding(word)


class _Examination:
    """One guest_memfd, looked at from the guest and from the host."""

    def __init__(self, opened: ExitStack, guest: MicroGuest, fd: int) -> None:
        self._opened = opened
        self._guest = guest
        self._fd = fd
        # What the slot's userspace_addr shows is never the guest_memfd: so the guest's first
        # read tells which memory serves it.
        self._other = memory_file(opened, AREA_SIZE)
        os.pwrite(self._other, _MARKER.to_bytes(8, "little"), WORD_AT)
        hva = mapped(opened, self._other, AREA_SIZE)
        guest.vm.set_user_memory_region2(1, guest.area_gpa, AREA_SIZE, hva, fd, 0)
        self._scratch = memory_file(opened, AREA_SIZE)

    def finding(self, word: str) -> Finding:
        first = self._guest.run()
        first_word = self._guest.word(first)
        if first_word is None:
            evidence = f"{word}; a guest's first access: {seen(first)}"
            return broken("faults", evidence, created=True, guest_faults="fail")
        served = "userspace_addr" if first_word == _MARKER else "guest_memfd"
        mapping = self._mapping()
        pread = outcome(lambda: os.pread(self._fd, 8, 0))
        read, write = self._host_access(mapping)
        before = self._pages()
        punched = outcome(lambda: fdops.punch_hole(self._fd, 0, AREA_SIZE))
        resident = self._pages()
        after = self._guest.run()
        emptied = self._guest.word(after) == 0
        parts = [
            "created",
            f"guest faults served from {served}",
            f"mmap {mapping if isinstance(mapping, str) else 'works'}",
            f"pread {pread}",
        ]
        if not isinstance(mapping, str):
            parts.append(f"host load {read}, store {write}")
        gone = "the guest reads zeros" if emptied else "the guest's bytes stay"
        parts.append(f"punch {punched}: {before} -> {resident} pages, {gone}")
        data = {
            "created": True,
            "guest_faults": served,
            "mmap": mapping if isinstance(mapping, str) else "works",
            "pread": pread,
            "host_load": read,
            "host_store": write,
            "punch": punched,
            "pages_before_punch": before,
            "pages_after_punch": resident,
            "guest_reads_zeros_after_punch": emptied,
        }
        if served == "userspace_addr":
            return no("only with attributes", f"{word}; {', '.join(parts)}", **data)
        if punched != "works" or not emptied:
            return broken("can't be punched", f"{word}; {', '.join(parts)}", **data)
        kept_out = read == write == "EFAULT"
        result = "host kept out" if kept_out else "host has access"
        return yes(result, f"{word}; {', '.join(parts)}", **data)

    def _mapping(self) -> int | str:
        try:
            return mapped(self._opened, self._fd, AREA_SIZE)
        except KvmError as error:
            return _name(error)

    def _host_access(self, mapping: int | str) -> tuple[str, str]:
        """What a load and a store would meet: tried by system calls into the mapping, in which
        EFAULT stands for SIGBUS."""
        if isinstance(mapping, str):
            return "no mapping", "no mapping"
        read = outcome(lambda: fdops.pwrite_from_address(self._scratch, mapping, 16, 0))
        if read == "works" and os.pread(self._scratch, 8, WORD_AT) != _GUEST_WORD.to_bytes(
            8, "little"
        ):
            read = "shows other bytes"
        os.pwrite(self._scratch, _HOST_WORD.to_bytes(8, "little"), 0)
        write = outcome(lambda: fdops.pread_to_address(self._scratch, mapping, 8, 0))
        return read, write

    def _pages(self) -> int | None:
        """How many pages the kernel holds; None where it doesn't say (before Linux 6.5)."""
        try:
            return fdops.cached_pages(self._fd)
        except KvmError:
            return None


def outcome(attempt: Callable[[], object]) -> str:
    """Either "works", or the errno's name."""
    try:
        attempt()
    except OSError as error:
        return _name(error)
    return "works"


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))
