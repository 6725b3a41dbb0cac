"""The PL031 real-time clock: seconds since 1970 in one register.

ARM PrimeCell Real Time Clock (PL031) Technical Reference Manual, chapter 3. Time is the injected
clock's plus whatever the guest set. The alarm's interrupt is not wired: its mask does not stick
and its status stays 0, so a guest sees that none will come.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

DATA, MATCH, LOAD, CONTROL, MASK = 0x00, 0x04, 0x08, 0x0C, 0x10
IDENTITY = 0xFE0
_IDENTITY_BYTES = bytes.fromhex("31 10 04 00 0d f0 05 b1")  # part 0x031, ARM, revision 0; PrimeCell
REGISTER_SIZE = 4
STARTED = 1  # control register: counting, which a guest can't end

NS_PER_SECOND = 1_000_000_000
_U32 = 0xFFFF_FFFF


class Pl031:
    """A page of 32-bit registers; other sizes and alignments read zero and write nothing.

    `clock` gives nanoseconds since 1970 UTC (time.time_ns).
    """

    __slots__ = ("_clock", "_lock", "_match", "_offset_seconds")

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._lock = Lock()
        self._match = 0
        self._offset_seconds = 0

    def read(self, offset: int, size: int) -> int:
        """A register; narrower reads of one see its low bytes, as Linux reads the identity."""
        if offset % REGISTER_SIZE or size > REGISTER_SIZE:
            return 0
        return self._register(offset) & (1 << 8 * size) - 1

    def _register(self, offset: int) -> int:
        if offset >= IDENTITY:
            return _IDENTITY_BYTES[(offset - IDENTITY) // REGISTER_SIZE]
        with self._lock:
            if offset == DATA:
                return (self._host_seconds() + self._offset_seconds) & _U32
            if offset == MATCH:
                return self._match
            if offset == LOAD:
                return (self._host_seconds() + self._offset_seconds) & _U32
        return STARTED if offset == CONTROL else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the time or the alarm; everything else is dropped."""
        if size != REGISTER_SIZE:
            return
        with self._lock:
            if offset == LOAD:
                self._offset_seconds = (value & _U32) - self._host_seconds()
            elif offset == MATCH:
                self._match = value & _U32

    def _host_seconds(self) -> int:
        return self._clock() // NS_PER_SECOND
