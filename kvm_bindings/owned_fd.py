"""What all kinds of KVM fds have in common: somebody owns them and closes them once."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self


class OwnedFd:
    """An open fd. Close it, or use it as a context manager."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

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
