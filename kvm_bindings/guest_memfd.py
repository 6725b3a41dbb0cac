"""guest_memfd: memory that belongs to one VM (KVM_CREATE_GUEST_MEMFD)."""

from __future__ import annotations

import errno
import os

from kvm_bindings import ioctls
from kvm_bindings._kvm import ffi
from kvm_bindings.errors import KvmError, fail
from kvm_bindings.owned_fd import OwnedFd


class PagesInUse(KvmError):
    """EAGAIN: somebody still holds a page that was to become private, the one at `offset`."""

    def __init__(self, operation: str, number: int, arguments: str, offset: int) -> None:
        super().__init__(operation, number, arguments, f"the page at {offset:#x} is in use")
        self.offset = offset


class GuestMemfd(OwnedFd):
    """A guest_memfd's fd, with the flags it was created with."""

    def __init__(self, fd: int, size: int, flags: int) -> None:
        super().__init__(fd)
        self.size = size
        self.flags = flags

    def has_file_io(self) -> bool:
        """Whether read, write and splice are file operations of a guest_memfd, as in no released
        kernel: pread(2) of the first byte, which makes no page, gives it, or refuses a private
        one."""
        try:
            return len(os.pread(self.fd, 1, 0)) == 1
        except OSError as error:
            return error.errno == errno.EACCES

    def set_memory_attributes2(self, offset: int, size: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2: make a range private (8) or shared (0), in place.

        What the pages hold afterwards is the VM type's business. Raises PagesInUse, then nothing
        has changed; KvmError (ENOTTY: this kernel keeps attributes with the VM, or none).
        """
        argument = ffi.new(
            "struct kvm_memory_attributes2 *",
            {"offset": offset, "size": size, "attributes": attributes},
        )
        result = self._pointer(ioctls.KVM_SET_MEMORY_ATTRIBUTES2, argument)
        if result < 0:
            name = "KVM_SET_MEMORY_ATTRIBUTES2"
            arguments = f"{offset=:#x}, {size=:#x}, {attributes=:#x}"
            if result == -errno.EAGAIN:
                raise PagesInUse(name, errno.EAGAIN, arguments, argument.error_offset)
            fail(name, result, arguments)
