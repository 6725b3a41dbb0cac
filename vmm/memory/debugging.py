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
        caches_code: bool = False,
    ) -> None:
        """`alias` is the scheme's address bit that picks the private side (0: one address for
        both). `sees_private`: private pages are served, too; raises ValueError where the host's
        kernel would refuse that. `announce` asks the policies (on_io). `caches_code`: what is
        written may be code that a processor has cached, see vmm.arch.debug.GuestDebug."""
        private = memory.private
        if sees_private and private is not None and private.host_access == "kernel-refused":
            raise ValueError(f"the host's kernel keeps pyvmm out of {private.name}")
        self._memory = memory
        self._alias = alias
        self._sees_private = sees_private
        self._announce = announce
        self._caches_code = caches_code
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

    def write(
        self, data: bytes, gpa: int, *, by_state: bool = False, as_code: bool = False
    ) -> None:
        """As `read`. `as_code`: raises where the guest might not execute what is written."""
        self._access(gpa, len(data), data, by_state, as_code)

    def _access(
        self, gpa: int, size: int, data: bytes | None, by_state: bool, as_code: bool = False
    ) -> bytes:
        name = "reads" if data is None else "writes"
        try:
            found = self._carry_out(gpa, size, data, by_state, as_code)
        except (GuestMemoryError, OSError):
            with self._lock:
                self.refused[name] += 1
            raise
        with self._lock:
            self.served[name] += 1
        return found

    def _carry_out(
        self, gpa: int, size: int, data: bytes | None, by_state: bool, as_code: bool
    ) -> bytes:
        bit = self._alias | self._memory.shared_bit  # one of them, if any
        marked = bool(gpa & bit) == bool(self._alias)
        gpa &= ~bit
        if gpa // PAGE_SIZE != (gpa + max(size, 1) - 1) // PAGE_SIZE:
            raise ValueError(f"{size} bytes at {gpa:#x} are in more than one page")
        page = Range(gpa, max(size, 1))
        if gpa < 0 or not self._memory.is_ram(page):
            raise UnmappedAccess(f"GPA {gpa:#x} is no RAM")
        states = self._memory.states(page)
        state = states[0][1]
        is_private = state in _PRIVATE
        if bit and not by_state and marked != is_private:
            side = "private" if marked else "shared"
            raise PrivateAccess(
                f"the guest maps GPA {gpa:#x} as {side}, and the page is {state.value}"
            )
        if is_private and not self._sees_private:
            raise PrivateAccess(f"GPA {gpa:#x} is {state.value}")
        if as_code and self._caches_code and self._side(page, is_private).is_guest_memfd:
            raise GuestMemoryError(
                f"GPA {gpa:#x} is in a guest_memfd, whose code a processor may have cached"
            )
        if self._announce is not None and size:
            self._announce(Range(gpa, size), data is not None, None)
        if is_private:
            found = self._touch_private(gpa, size, data)
            with self._lock:
                self.private_bytes += size
            return found
        there = gpa | self._memory.shared_bit
        if data is None:
            return self._memory.pread(size, there)
        self._memory.pwrite(data, there)
        self._forget(self._memory.shared, page)
        return b""

    def _side(self, page: Range, is_private: bool) -> Backing:
        private = self._memory.private
        if not is_private or private is None or page.overlaps(self._memory.common):
            return self._memory.shared
        return private

    def _forget(self, backing: Backing, page: Range) -> None:
        if self._caches_code:
            backing.forget_mapping(page.start, page.size)

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
            backing = self._side(page, is_private=True)
            if data is None:
                return backing.pread(size, gpa)
            backing.pwrite(data, gpa)
            self._forget(backing, page)
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
