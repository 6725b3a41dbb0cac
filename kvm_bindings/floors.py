"""What C does at best: the floors that `pyvmm bench` measures Python against.

Nothing that runs guests uses this.
"""

from __future__ import annotations

from kvm_bindings._kvm import lib
from kvm_bindings.errors import check


def _checked(operation: str, nanoseconds: int, count: int) -> float:
    """Nanoseconds for one of `count`; KvmError for a negative error number."""
    return check(operation, nanoseconds) / count


def pread_ns(fd: int, address: int, size: int, span: int, count: int) -> float:
    """One pread(2) of `size` bytes to `address`, in a C loop whose offsets walk over `span`."""
    return _checked("pread", lib.pyvmm_floor_pread(fd, address, size, span, count), count)


def pwrite_ns(fd: int, address: int, size: int, span: int, count: int) -> float:
    """One pwrite(2), as `pread_ns`."""
    return _checked("pwrite", lib.pyvmm_floor_pwrite(fd, address, size, span, count), count)


def pread_mapped_ns(fd: int, address: int, size: int, span: int, count: int) -> float:
    """One pread(2) of a file into a mapping that starts at `address`, at the same offset."""
    return _checked("pread", lib.pyvmm_floor_pread_mapped(fd, address, size, span, count), count)


def memcpy_ns(
    target: int, target_span: int, source: int, source_span: int, size: int, count: int
) -> float:
    """One memcpy(3); both addresses walk over their spans."""
    return _checked(
        "memcpy",
        lib.pyvmm_floor_memcpy(target, target_span, source, source_span, size, count),
        count,
    )


def splice_ns(
    source: int, target: int, size: int, span: int, count: int, pipe: tuple[int, int]
) -> float:
    """A file's bytes into another file through a pipe (read end, write end)."""
    return _checked(
        "splice", lib.pyvmm_floor_splice(source, target, size, span, count, *pipe), count
    )


def ioctl_ns(fd: int, request: int, count: int) -> float:
    """One ioctl(2) without argument: KVM_RUN in a loop that looks at nothing."""
    return _checked("ioctl", lib.pyvmm_floor_ioctl(fd, request, count), count)


def tick_rate(milliseconds: int = 50) -> int:
    """Ticks of the time stamp counter in a second; 0 where there is none."""
    return int(lib.pyvmm_floor_tick_rate(milliseconds))
