"""What all kinds of KVM fds have in common: ioctls, and an owner who closes them once."""

from __future__ import annotations

import errno
import os

from kvm_bindings._kvm import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self


class OwnedFd:
    """An open fd. Close it, or use it as a context manager."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def _value(self, request: int, value: int = 0) -> int:
        """An ioctl whose argument is a number; EINTR is retried, as everywhere but KVM_RUN.

        0 or more, or -errno.
        """
        while True:
            result = int(lib.pyvmm_ioctl_value(self.fd, request, value))
            if result != -errno.EINTR:
                return result

    def _pointer(self, request: int, argument: Any) -> int:
        """An ioctl whose argument is a structure, as `_value`."""
        while True:
            result = int(lib.pyvmm_ioctl_pointer(self.fd, request, argument))
            if result != -errno.EINTR:
                return result

    def close(self) -> None:
        """Close the fd; any number of times."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
