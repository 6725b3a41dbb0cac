"""How an ioctl's number is made of its direction, KVM's letter, a number and a size.

Source: include/uapi/asm-generic/ioctl.h; computed with ioctl-opt, whose own IOR, IOW and IOWR
accept ctypes types only.
"""

from __future__ import annotations

from ioctl_opt import IO, IOC, IOC_READ, IOC_WRITE

KVMIO = 0xAE


def none(number: int) -> int:
    """_IO: without an argument, or with a number as the argument."""
    return int(IO(KVMIO, number))


def read(number: int, size: int) -> int:
    """_IOR: the kernel fills in a structure of `size` bytes."""
    return int(IOC(IOC_READ, KVMIO, number, size))


def write(number: int, size: int) -> int:
    """_IOW: the kernel reads a structure of `size` bytes."""
    return int(IOC(IOC_WRITE, KVMIO, number, size))


def both(number: int, size: int) -> int:
    """_IOWR: the kernel reads and fills in."""
    return int(IOC(IOC_READ | IOC_WRITE, KVMIO, number, size))
