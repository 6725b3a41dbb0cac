"""Disk images that a user gives: what their bytes are, whether they fit, and are free.

A disk is raw bytes here. An image in a format of its own would look like a disk without a
partition table, and the guest's first write would destroy it; so its format is recognised by the
format's own magic and named.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from vmm.core.errors import UsageError

SECTOR = 512

_HEAD = 0x48  # bytes from the start that magics lie in
_MAGICS = (
    (0, b"QFI\xfb", "qcow2", "qcow2"),  # QEMU docs/interop/qcow2.rst
    (0, b"QED\0", "QED", "qed"),
    (0, b"KDMV", "VMDK", "vmdk"),
    (0, b"COWD", "VMDK", "vmdk"),
    (0, b"# Disk Descriptor", "VMDK", "vmdk"),
    (0, b"vhdxfile", "VHDX", "vhdx"),
    (0, b"conectix", "VHD", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI", "vdi"),
)
"""(offset, bytes, name, what qemu-img calls it)."""
_VHD_FOOTER = b"conectix"  # a fixed VHD has it in its last sector only
_BLKROGET = 0x125E  # <linux/fs.h>: whether a block device is read-only, as an int
_FLOCK = struct.Struct("@hhqqi4x")
"""<fcntl.h>'s struct flock with 64-bit offsets: type, whence, start, length, pid."""
_UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_raw(fd: int, option: str, path: str, *, raw: bool = False) -> int:
    """The bytes of the raw image or block device `path`, open as `fd` for `option`.

    `raw` takes an image's bytes as they are, whatever format they look like. Raises UsageError
    for what would lose something: another format, a size that no number of sectors has.
    """
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        known = None if raw else _format(fd, size)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror}") from error
    if known is not None:
        name, word = known
        raise UsageError(
            f"{option} {path} is a {name} image, and a disk here is raw bytes; convert it with: "
            f"qemu-img convert -f {word} -O raw {path} {path}.raw (or add format=raw to use the "
            "file's bytes as they are)"
        )
    if size < SECTOR:
        raise UsageError(
            f"{option} {path}: {size} bytes are less than one sector of {SECTOR}; "
            f"make it larger, for example with: truncate -s 1G {path}"
        )
    if size % SECTOR:
        raise UsageError(
            f"{option} {path}: {size} bytes are no multiple of the {SECTOR} of a sector; "
            f"fill the last one up with: truncate -s %{SECTOR} {path}"
        )
    return size


def _format(fd: int, size: int) -> tuple[str, str] | None:
    head = os.pread(fd, _HEAD, 0)
    for offset, magic, name, word in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name, word
    if size >= SECTOR and os.pread(fd, len(_VHD_FOOTER), size - SECTOR) == _VHD_FOOTER:
        return "VHD", "vpc"
    return None


def is_read_only_device(fd: int) -> bool:
    """Whether `fd` is a block device that takes no writes, which open(2) may not have said."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return False
    return fcntl.ioctl(fd, _BLKROGET, struct.pack("i", 0)) != struct.pack("i", 0)


def lock(fd: int, *, write: bool) -> bool:
    """Take the whole image for this open file: many readers, or one writer. False: taken.

    An open file description lock (fcntl(2)): it ends with the last copy of `fd`, also when the
    process is killed, and two disks of one process get into each other's way as well. QEMU locks
    bytes of its images in the same manner. File systems without locks are let through.
    """
    kind = fcntl.F_WRLCK if write else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return True
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def in_use(option: str, path: str, *, write: bool) -> UsageError:
    """The error for an image that `lock` could not have."""
    hint = "" if not write else f", open it read-only on both sides ({path},ro)"
    return UsageError(
        f"{option} {path} is in use by another machine, or given twice; end that one, "
        f"use a copy{hint}, or add share=on if what is in it can be written from both"
    )
