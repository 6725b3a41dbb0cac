"""Data-path engines for a protected guest's memory, which only copying calls may reach."""

from __future__ import annotations

from vmm.core.errors import UsageError
from vmm.core.lean_typing import Any
from vmm.memory.backing import Backing
from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking


class ObservedEngine:
    """`auto` copies between the file and guest memory by one call, where the file's reads and
    writes are copies; `pread`, and `auto` elsewhere, through a buffer of ours.

    `fd2fd` and `mmap` are what destroys a protected guest's pages. Raises UsageError for them.
    """

    fallbacks = 0

    def __init__(self, name: str, side: Backing) -> None:
        if name not in ("auto", "pread"):
            raise UsageError(
                f"io={name}: a protected guest's memory is reached by copying system calls alone "
                "(scheme pkvm); use io=auto or io=pread"
            )
        if not isinstance(side, ProtectedMemfdBacking):
            raise TypeError(f"{side.name} is no protected guest's memory")
        self.name = name
        self._side = side
        self._bounce = name == "pread"
        self.bytes_by = {side.access: 0}

    def transfer_in(self, src_fd: int, src_offset: int, offset: int, size: int) -> int:
        return self.move_in(src_fd, [src_offset, offset, size])

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        return self.move_out([offset, dst_offset, size], dst_fd)

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        return self._count(self._side.move_in(src_fd, moves, bounce=self._bounce))

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        return self._count(self._side.move_out(moves, dst_fd, bounce=self._bounce))

    def _count(self, moved: int) -> int:
        self.bytes_by[self._side.access] += moved
        return moved

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": dict(self.bytes_by), "fallbacks": self.fallbacks}

    def close(self) -> None:
        """The backing is its owner's."""
