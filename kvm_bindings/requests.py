"""How an ioctl's number is made of its direction, KVM's letter, a number and a size.

Source: include/uapi/asm-generic/ioctl.h. What they are made of is computed with ioctl-opt when the
extension is built (REQUESTS in build.py), the size is added here.
"""

from __future__ import annotations

from kvm_bindings._kvm import lib

_IO, _IOR, _IOW, _IOWR = (
    int(base) for base in (lib.PYVMM_IO, lib.PYVMM_IOR, lib.PYVMM_IOW, lib.PYVMM_IOWR)
)
_SIZE = int(lib.PYVMM_IOC_SIZE)


def none(number: int) -> int:
    """_IO: without an argument, or with a number as the argument."""
    return _IO | number


def read(number: int, size: int) -> int:
    """_IOR: the kernel fills in a structure of `size` bytes."""
    return _IOR | _SIZE * size | number


def write(number: int, size: int) -> int:
    """_IOW: the kernel reads a structure of `size` bytes."""
    return _IOW | _SIZE * size | number


def both(number: int, size: int) -> int:
    """_IOWR: the kernel reads and fills in."""
    return _IOWR | _SIZE * size | number
