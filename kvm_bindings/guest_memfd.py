"""guest_memfd: memory that belongs to one VM (KVM_CREATE_GUEST_MEMFD)."""

from __future__ import annotations

from kvm_bindings.owned_fd import OwnedFd


class GuestMemfd(OwnedFd):
    """A guest_memfd's fd, with the flags it was created with."""

    def __init__(self, fd: int, size: int, flags: int) -> None:
        super().__init__(fd)
        self.size = size
        self.flags = flags
