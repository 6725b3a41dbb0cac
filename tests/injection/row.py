"""The words of the table of calls that fail: errors, outcomes, and what a row says."""

from __future__ import annotations

import errno

from tests.injection.injecting import SHORT
from vmm.core.lean_typing import NamedTuple

SAME = "nobody notices"
"""The call is repeated, or another way is taken: answers, bytes and counts are as without it."""
GUEST = "guest told"
"""Its request ends with an I/O error, its conversion with the errno; the machine goes on."""
RESET = "device stops"
"""DEVICE_NEEDS_RESET; its driver may reset it, and the machine goes on."""
SAID = "one line, goes on"
"""The user is told; the guest's run is what it would have been."""
DROPPED = "bytes dropped"
"""Output or frames that nobody can take any more; the machine goes on."""
CALLER = "caller told"
"""Whoever asked (a client, a reader of the memory file) has the error, or is hung up on."""
ENDS_1, ENDS_2, ENDS_3 = (f"one line, status {status}" for status in (1, 2, 3))
NOT_GIVEN = ""
"""The call can't give it."""

OUTCOMES = (SAME, GUEST, RESET, SAID, DROPPED, CALLER, ENDS_1, ENDS_2, ENDS_3)
EINTR, EIO, ENOSPC, ENOMEM = errno.EINTR, errno.EIO, errno.ENOSPC, errno.ENOMEM
EAGAIN, EFBIG, EDQUOT = errno.EAGAIN, errno.EFBIG, errno.EDQUOT
EMFILE, EPIPE, EFAULT = errno.EMFILE, errno.EPIPE, errno.EFAULT
ENOENT, EINVAL, ENODEV, EBADFD = errno.ENOENT, errno.EINVAL, errno.ENODEV, errno.EBADFD
EACCES, EPERM, ENOSYS, EADDRINUSE = errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EADDRINUSE
EBUSY, E2BIG, ENOLCK = errno.EBUSY, errno.E2BIG, errno.ENOLCK
COLUMNS = (EINTR, SHORT, EIO, ENOSPC, ENOMEM, EAGAIN, EFBIG, EDQUOT, EMFILE, EPIPE)

FS_IOC_FIEMAP = 0xC020660B
TCSETS, TCSETSF, MADV_DONTDUMP = 0x5402, 0x5404, 16
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8

BY_SHIM, BY_STRACE, BY_PROGRAM, BY_MODEL = "shim", "strace", "program", "model"
Cells = dict[int, str]


class Row(NamedTuple):
    """A call on a kind of object, in one of a run's paths."""

    path: str
    call: str
    """As strace names it, or an ioctl's name; `splice-in` reads a file, `splice-out` writes one."""
    on: str
    cells: Cells
    """By errno (SHORT: fewer bytes than asked for)."""
    by: str = BY_SHIM
    scenario: str = ""
    """Which run it is injected into (tests.injection.runs), or which program; for BY_MODEL, what
    the model of KVM is driven by."""
    match: str = "*"
    """The object, as /proc/self/fd names it (see shim.c)."""
    request: int = 0
    first: int = 1
    """From which such call on: errors stay, as those of a broken disk do."""
    lasts: bool = True
    """Whether they stay. EINTR never does."""
    slow: bool = False
    """What comes of it takes seconds: not in every test run."""

    @property
    def name(self) -> str:
        return f"{self.path}-{self.call}-{self.on}".replace(" ", "_").replace("/", "_")


def all_of(outcome: str, *errors: int, **more: str) -> Cells:
    return dict.fromkeys(errors, outcome)
