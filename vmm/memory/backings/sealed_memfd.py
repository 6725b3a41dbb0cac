"""A memfd whose size nobody can change any more."""

from __future__ import annotations

import fcntl
import os

from vmm.memory.backings.memfd import MemfdBacking


class SealedMemfdBacking(MemfdBacking):
    """A memfd sealed against shrinking and growing, and against other seals.

    For memory whose fd is handed to other processes: one that truncates it would take the pages
    away under the guest's feet. Holes still work: they are not a change of size.
    """

    name = "memfd-sealed"
    _flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING

    def _prepare(self, fd: int) -> None:
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
