"""Keeps the kernel from reading ahead of a disk's reads where that is work and no gain.

It reads ahead as much as the file's device is set to, which may be 8 MiB at a time. Data it asks
the device for, and goes on; holes it fills with zeros at once, in the time of the thread that
reads: some 2 ms for each MiB.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

from vmm.devices.virtio.budget import TURN_SECONDS
from vmm.devices.virtio.segments import aligned_pieces

AHEAD = 16 << 20
"""Bytes: twice what most devices are set to at most, so that it holds the last page, too, that the
kernel reads on from."""

# struct fiemap (linux/fiemap.h): start, length, flags, mapped_extents, extent_count, reserved; then
# extents: logical, physical, length, 16 bytes reserved, flags, 12 bytes reserved.
_FS_IOC_FIEMAP = 0xC020660B
_UNWRITTEN = 1 << 11
_FEW_EXTENTS = 32
_MOST_EXTENTS = 2048  # with a page's hole behind each page they reach as far as AHEAD
_HEAD = struct.Struct("<QQIIII")
_EXTENT = struct.Struct("<QQQ16xI12x")

_DROPPED_AT_ONCE = 4 << 20
# With ends that no large page lies across, which would stay.


def keep_from_zeroing(fd: int, position: int) -> None:
    """To be called after a read up to `position` that had to be waited for, and now and then.

    If what follows is not all data, nothing is read ahead any more until this is called where it
    is, and what is there of the holes already is dropped: the kernel reads on when it meets a page
    that was read ahead, whatever it was advised. Holes alone, because pages that have been written
    would go to the disk first.
    """
    holes = _holes(fd, position, min(position + AHEAD, os.fstat(fd).st_size))
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM if holes else os.POSIX_FADV_NORMAL)
    until = time.monotonic() + TURN_SECONDS  # an unwritten extent may have been written to
    for start, end in holes:
        for at, size in aligned_pieces(start, end - start, _DROPPED_AT_ONCE):
            os.posix_fadvise(fd, at, size, os.POSIX_FADV_DONTNEED)
            if time.monotonic() > until:
                return


def _holes(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """Where the file has no data between `start` and `end`, as (start, end). None where the file
    system doesn't say, and in a block device, which has no size that stat(2) tells."""
    if start >= end:
        return []
    holes: list[tuple[int, int]] = []
    for room in (_FEW_EXTENTS, _MOST_EXTENTS):
        request = bytearray(_HEAD.size + room * _EXTENT.size)
        _HEAD.pack_into(request, 0, start, end - start, 0, 0, room, 0)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        except OSError:
            return []
        count = _HEAD.unpack_from(request)[3]
        if count < room:
            break
    for number in range(count):
        extent = _EXTENT.unpack_from(request, _HEAD.size + number * _EXTENT.size)
        first, _, size, flags = extent
        if flags & _UNWRITTEN:
            continue
        if first > start:
            holes.append((start, first))
        start = first + size
    if start < end:
        holes.append((start, end))
    return holes
