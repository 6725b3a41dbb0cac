"""guest_memfd: memory that belongs to one VM (KVM_CREATE_GUEST_MEMFD)."""

from __future__ import annotations

import os


class GuestMemfd:
    """A guest_memfd's fd, with the flags it was created with. Owned: close it."""

    def __init__(self, fd: int, size: int, flags: int) -> None:
        self.fd = fd
        self.size = size
        self.flags = flags

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
