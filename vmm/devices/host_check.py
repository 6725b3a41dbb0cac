"""The host's half of the embedded payload's page test: verify one pattern, leave another.

The payload writes gpa ^ GUEST_PATTERN to each 8-byte word of shared pages and rings; the host
reads that through GuestMemory and answers with gpa ^ HOST_PATTERN, which the payload verifies.
"""

from __future__ import annotations

import errno
import sys

from vmm.core.errors import PrivateAccess, UnmappedAccess
from vmm.memory.guest_memory import GuestMemory

GUEST_PATTERN = 0x5041_594C_4F41_4421  # "PAYLOAD!"
HOST_PATTERN = 0x484F_5354_484F_5354  # "HOSTHOST"
LARGEST_CHECK = 4 << 20


def pattern(gpa: int, size: int, key: int) -> bytes:
    """`size` bytes (a multiple of 8) whose little-endian word at address a is a ^ key."""
    from array import array  # long after the guest has begun

    ramp = array("Q", range(gpa, gpa + size, 8))
    if sys.byteorder == "big":
        ramp.byteswap()
    keys = key.to_bytes(8, "little") * (size // 8)
    mixed = int.from_bytes(ramp.tobytes(), "little") ^ int.from_bytes(keys, "little")
    return mixed.to_bytes(size, "little")


def host_check(memory: GuestMemory, gpa: int, size: int) -> int:
    """Verify and replace the pattern in [gpa, gpa + size); 0 or a negative errno.

    -EINVAL: not RAM, nothing, or too much; -EACCES: not wholly shared; -EIO: another content;
    or what the host's kernel refuses the access with.
    """
    if not 0 < size <= LARGEST_CHECK:
        return -errno.EINVAL
    try:
        if memory.pread(size, gpa) != pattern(gpa, size, GUEST_PATTERN):
            return -errno.EIO
        memory.pwrite(pattern(gpa, size, HOST_PATTERN), gpa)
    except UnmappedAccess:
        return -errno.EINVAL
    except PrivateAccess:
        return -errno.EACCES
    except OSError as error:
        return -(error.errno or errno.EIO)
    return 0
