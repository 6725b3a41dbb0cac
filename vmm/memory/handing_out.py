"""Guest memory handed to the kernel as another call's buffer: by address, out of KVM's mapping.

As a disk's transfers go (`vmm.memory.engines.HvaEngine`): nothing of ours looks at the bytes, and
GuestMemory has found all of them shared, and holds conversions off, while the call lasts.
"""

from __future__ import annotations

from collections.abc import Callable

from kvm_bindings import fdops
from vmm.core.lean_typing import TYPE_CHECKING, cast
from vmm.core.ranges import PAGE_SIZE
from vmm.memory.guest_memory import GuestMemory

if TYPE_CHECKING:
    from vmm.memory.engines import Engine


class HandingOut:
    """One caller's way; not for several threads at once."""

    def __init__(self, memory: GuestMemory) -> None:
        self._side = memory.shared
        # An engine as far as that: `transfer_out` is what GuestMemory calls when all is held.
        self._through = memory.through(cast("Engine", self))
        self._take: Callable[[int, int], None] | None = None

    def can(self) -> bool:
        """Whether that mapping may be a system call's buffer: no private page is in it."""
        side = self._side
        return bool(
            side.hva
            and side.access == "pread/pwrite"
            and side.name != "memfd-protected"
            and not side.is_guest_memfd
            and not side.traits.in_place
        )

    def give(self, gpa: int, size: int, take: Callable[[int, int], None]) -> bool:
        """Call `take` with the address of the bytes and their number, within its memory's hold.

        False, and it is not called, where not all of the bytes are there yet: through a mapping,
        holes that are only looked at would become memory. Raises GuestMemoryError where not all of
        them are shared.
        """
        self._take = take
        try:
            return self._through.transfer_out(gpa, size, -1, 0) == size
        finally:
            self._take = None

    def transfer_out(self, offset: int, size: int, dst_fd: int, dst_offset: int) -> int:
        side = self._side
        first, end = offset // PAGE_SIZE * PAGE_SIZE, offset + size
        pages = -(-(end - first) // PAGE_SIZE)
        try:
            if end > side.size or fdops.cached_pages(side.fd, first, end - first) < pages:
                return 0
        except OSError:
            return 0  # a kernel that doesn't tell
        assert self._take is not None
        self._take(side.hva + offset, size)
        return size
