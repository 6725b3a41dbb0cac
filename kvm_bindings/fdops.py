"""System calls on backing fds that Python's os module lacks; nothing in here is about KVM.

A mapping made here is an integer, never a Python buffer: no Python code can read or write
guest memory through it by accident.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from kvm_bindings._kvm import lib
from kvm_bindings.errors import KvmError, check, fail

PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
MAP_SHARED = 1
MAP_PRIVATE = 2
MAP_NORESERVE = 0x4000

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
_FALLOC_NAMES = {
    FALLOC_FL_KEEP_SIZE: "KEEP_SIZE",
    FALLOC_FL_PUNCH_HOLE: "PUNCH_HOLE",
    FALLOC_FL_ZERO_RANGE: "ZERO_RANGE",
}
_MOVE = "fd={}, address={:#x}, size={:#x}, offset={:#x}"


def _uninterrupted(call: Callable[..., int], *arguments: int) -> int:
    """Repeat a call while signals interrupt it (their handlers run in between, as PEP 475 has it).

    A file on FUSE or a network may interrupt what a local one doesn't.
    """
    while True:
        result = int(call(*arguments))
        if result != -errno.EINTR:
            return result


def map_shared(
    fd: int, size: int, *, offset: int = 0, protection: int = 3, reserve: bool = False
) -> int:
    """mmap(2) with MAP_SHARED: the address as an integer. Raises KvmError.

    The kernel leaves every mapping made here out of core dumps (MADV_DONTDUMP).

    `reserve` has the kernel set the pages of a hugetlb file aside now (ENOMEM: too few).
    """
    return _map(fd, size, offset, protection, MAP_SHARED | (0 if reserve else MAP_NORESERVE))


def map_copy_on_write(fd: int, size: int) -> int:
    """mmap(2) with MAP_PRIVATE: what no guest memory allows, for tests that it doesn't."""
    return _map(fd, size, 0, PROT_READ | PROT_WRITE, MAP_PRIVATE)


def _map(fd: int, size: int, offset: int, protection: int, flags: int) -> int:
    address = int(lib.pyvmm_map(fd, offset, size, protection, flags))
    text = "fd={}, offset={:#x}, size={:#x}, flags={:#x}"
    return check("mmap", address, text, fd, offset, size, flags)


def unmap(address: int, size: int) -> None:
    """munmap(2). Raises KvmError."""
    check("munmap", lib.pyvmm_unmap(address, size), "address={:#x}, size={:#x}", address, size)


def protect(address: int, size: int, protection: int) -> None:
    """mprotect(2); PROT_NONE makes any dereference of a mapping fail. Raises KvmError."""
    result = lib.pyvmm_protect(address, size, protection)
    check("mprotect", result, "address={:#x}, size={:#x}, {}", address, size, protection)


def forget(address: int, size: int) -> None:
    """madvise(2) with MADV_DONTNEED: a shared mapping's page-table entries go, here and in KVM's
    memslots over it; the file's pages stay. Raises KvmError."""
    result = lib.pyvmm_forget(address, size)
    check("madvise", result, "address={:#x}, size={:#x}, MADV_DONTNEED", address, size)


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2) with FALLOC_FL_ bits as `mode`. Raises KvmError."""
    result = _uninterrupted(lib.pyvmm_fallocate, fd, mode, offset, size)
    if result < 0:
        words = "|".join(word for bit, word in _FALLOC_NAMES.items() if mode & bit)
        fail("fallocate", result, f"fd={fd}, {words}, offset={offset:#x}, size={size:#x}")


def punch_hole(fd: int, offset: int, size: int) -> None:
    """fallocate(2) with PUNCH_HOLE: the pages are given back and read as zeros. Raises KvmError.

    KEEP_SIZE belongs to it: guest_memfd refuses the call without.
    """
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)


def zero_range(fd: int, offset: int, size: int) -> None:
    """fallocate(2) with ZERO_RANGE: the range reads as zeros and stays allocated. KvmError."""
    fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, size)


def pread_to_address(fd: int, address: int, size: int, offset: int) -> int:
    """pread(2) of a file straight into a mapping; the kernel copies. Bytes moved, or KvmError."""
    moved = _uninterrupted(lib.pyvmm_pread_to_address, fd, address, size, offset)
    return check("pread", moved, _MOVE, fd, address, size, offset)


def pwrite_from_address(fd: int, address: int, size: int, offset: int) -> int:
    """pwrite(2) to a file straight from a mapping; the kernel copies. Bytes moved, or KvmError."""
    moved = _uninterrupted(lib.pyvmm_pwrite_from_address, fd, address, size, offset)
    return check("pwrite", moved, _MOVE, fd, address, size, offset)


def cached_pages(fd: int, offset: int = 0, size: int = 0) -> int:
    """Pages the kernel holds for a file, by cachestat(2): the only way to ask a guest_memfd.

    `size` 0 is to the file's end. Raises KvmError: ENOSYS before Linux 6.5, EOPNOTSUPP for
    hugetlbfs.
    """
    return check("cachestat", int(lib.pyvmm_cached_pages(fd, offset, size)), "fd={}", fd)


def memfd_secret() -> int:
    """memfd_secret(2): a file whose pages even the kernel has no mapping of; its fd.

    Raises KvmError: ENOSYS where the kernel was started without secretmem.
    """
    return check("memfd_secret", int(lib.pyvmm_memfd_secret(os.O_CLOEXEC)))


def forbid_core_dumps() -> None:
    """RLIMIT_CORE 0 and PR_SET_DUMPABLE 0 for this process. Raises KvmError.

    Without the second, a core_pattern that is a pipe gets a dump whatever the limit says. It also
    gives /proc/self to root: other users must have opened there what they need, mem for example.
    """
    check("forbidding core dumps", lib.pyvmm_forbid_core_dumps())


__all__ = [
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "KvmError",
    "cached_pages",
    "fallocate",
    "forbid_core_dumps",
    "forget",
    "map_copy_on_write",
    "map_shared",
    "memfd_secret",
    "pread_to_address",
    "protect",
    "punch_hole",
    "pwrite_from_address",
    "unmap",
    "zero_range",
]
