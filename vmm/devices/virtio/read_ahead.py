"""What a disk's file has behind a place, for `vmm.devices.virtio.block_file.ReadAhead`."""

from __future__ import annotations

import fcntl
import os
import struct
import time

from vmm.devices.virtio.block_file import advise
from vmm.devices.virtio.budget import TURN_SECONDS
from vmm.devices.virtio.segments import aligned_pieces

# struct fiemap (linux/fiemap.h): start, length, flags, mapped_extents, extent_count, reserved; then
# extents: logical, physical, length, 16 bytes reserved, flags, 12 bytes reserved.
_FS_IOC_FIEMAP = 0xC020660B
_UNWRITTEN = 1 << 11
_MOST_EXTENTS = 64
_HEAD = struct.Struct("<QQIIII")
_EXTENT = struct.Struct("<QQQ16xI12x")

# With ends that no large page lies across, which would stay.
_DROPPED_AT_ONCE = 4 << 20


def holes(fd: int, start: int, size: int) -> list[tuple[int, int]]:
    """What of this part of the file, up to its end, is a hole, or was allocated and never written,
    as (start, end).

    None where the file system doesn't tell, and in a block device. Behind more extents than are
    worth to be looked at the rest counts as one.
    """
    # Not by stat(2), which takes a path: a device's process has no use for any.
    end = min(start + size, os.lseek(fd, 0, os.SEEK_END))
    if start >= end:
        return []
    request = bytearray(_HEAD.size + _MOST_EXTENTS * _EXTENT.size)
    _HEAD.pack_into(request, 0, start, end - start, 0, 0, _MOST_EXTENTS, 0)
    try:
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
    except OSError:
        return []
    found = []
    for number in range(_HEAD.unpack_from(request)[3]):
        extent = _EXTENT.unpack_from(request, _HEAD.size + number * _EXTENT.size)
        first, _, length, flags = extent
        if flags & _UNWRITTEN:
            continue
        if first > start:
            found.append((start, first))
        start = first + length
    if start < end:
        found.append((start, end))
    return found


def drop(fd: int, parts: list[tuple[int, int]]) -> None:
    """Drop what the host holds of these parts of the file (start, end) and needn't write. Pages
    that wait to be written are written first, which may take long: for a turn's time at most."""
    until = time.monotonic() + TURN_SECONDS
    for start, end in parts:
        for at, length in aligned_pieces(start, end - start, _DROPPED_AT_ONCE):
            advise(fd, at, length, os.POSIX_FADV_DONTNEED)
            if time.monotonic() > until:
                return
