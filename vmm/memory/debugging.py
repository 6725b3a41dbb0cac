"""Guest memory as a debugger sees it: what the host may touch, and nothing else.

A private page is refused, never zeros. In a rehearsal, where the host's kernel would allow it, the
user may ask for more: then private pages are read and written, too, and counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from threading import get_ident

from vmm.core.errors import GuestMemoryError, PrivateAccess, UnmappedAccess
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backing import Backing
from vmm.memory.guest_memory import GuestMemory, PageState

Announce = Callable[[Range, bool, str | None], None]
_PRIVATE = (PageState.PRIVATE, PageState.DEFERRED, PageState.LENT)


class DebugAccess:
    """Reads and writes by guest-physical address. Safe to use from several threads."""

    def __init__(
        self,
        memory: GuestMemory,
        alias: int = 0,
        *,
        sees_private: bool = False,
        announce: Announce | None = None,
    ) -> None:
        """`alias` is the scheme's address bit that picks the private side (0: one address for
        both). `sees_private`: private pages are served, too; raises ValueError where the host's
        kernel would refuse that. `announce` asks the policies (on_io)."""
        private = memory.private
        if sees_private and private is not None and private.host_access == "kernel-refused":
            raise ValueError(f"the host's kernel keeps pyvmm out of {private.name}")
        self._memory = memory
        self._alias = alias
        self._sees_private = sees_private
        self._announce = announce
        self._lock = threading.Lock()
        self.served = {"reads": 0, "writes": 0}
        """Accesses, not bytes."""
        self.refused = {"reads": 0, "writes": 0}
        self.private_bytes = 0
        """Bytes of private pages that were read or written."""

    @property
    def sees_private(self) -> bool:
        return self._sees_private

    def states(self, within: Range) -> list[tuple[Range, PageState]]:
        """Page states, in runs; no RAM is left out."""
        return self._memory.states(within)

    def read(self, size: int, gpa: int, *, by_state: bool = False) -> bytes:
        """`size` bytes within one page. `by_state`: the side in use, as `gpa` has no address bit.

        Raises GuestMemoryError, whose text says why, and OSError.
        """
        return self._access(gpa, size, None, by_state)

    def write(self, data: bytes, gpa: int, *, by_state: bool = False) -> None:
        """As `read`."""
        self._access(gpa, len(data), data, by_state)

    def _access(self, gpa: int, size: int, data: bytes | None, by_state: bool) -> bytes:
        name = "reads" if data is None else "writes"
        try:
            found = self._carry_out(gpa, size, data, by_state)
        except (GuestMemoryError, OSError):
            with self._lock:
                self.refused[name] += 1
            raise
        with self._lock:
            self.served[name] += 1
        return found

    def _carry_out(self, gpa: int, size: int, data: bytes | None, by_state: bool) -> bytes:
        marked = bool(gpa & self._alias)
        gpa &= ~self._alias
        if gpa // PAGE_SIZE != (gpa + max(size, 1) - 1) // PAGE_SIZE:
            raise ValueError(f"{size} bytes at {gpa:#x} are in more than one page")
        page = Range(gpa, max(size, 1))
        if gpa < 0 or not self._memory.is_ram(page):
            raise UnmappedAccess(f"GPA {gpa:#x} is no RAM")
        states = self._memory.states(page)
        state = states[0][1]
        is_private = state in _PRIVATE
        if self._alias and not by_state and marked != is_private:
            side = "private" if marked else "shared"
            raise PrivateAccess(
                f"the guest maps GPA {gpa:#x} as {side}, and the page is {state.value}"
            )
        if is_private and not self._sees_private:
            raise PrivateAccess(f"GPA {gpa:#x} is {state.value}")
        if self._announce is not None and size:
            self._announce(Range(gpa, size), data is not None, None)
        if is_private:
            found = self._touch_private(gpa, size, data)
            with self._lock:
                self.private_bytes += size
            return found
        if data is None:
            return self._memory.pread(size, gpa)
        self._memory.pwrite(data, gpa)
        return b""

    def _touch_private(self, gpa: int, size: int, data: bytes | None) -> bytes:
        """The page's private side, with conversions of it held off meanwhile."""
        memory = self._memory
        with memory._lock:
            state = memory._states.uniform(gpa, gpa + max(size, 1))
            page = Range(gpa, max(size, 1))
            if state not in _PRIVATE or memory._converting_in(page) is not None:
                raise PrivateAccess(f"GPA {gpa:#x} is converting")
            memory._in_flight[get_ident()] = (gpa, gpa + size, None)
        try:
            backing: Backing | None = memory.private
            if backing is None or page.overlaps(memory.common):
                backing = memory.shared
            if data is None:
                return backing.pread(size, gpa)
            backing.pwrite(data, gpa)
            return b""
        finally:
            memory._leave()

    def as_dict(self) -> dict[str, object]:
        """For the report."""
        with self._lock:
            return {
                "sees_private": self._sees_private,
                "served": dict(self.served),
                "refused": dict(self.refused),
                "private_bytes": self.private_bytes,
            }
