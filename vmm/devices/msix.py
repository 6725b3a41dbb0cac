"""MSI-X: a function's table of message interrupts and its pending bits, in a memory BAR.

PCI Local Bus Specification 3.0, 6.8.2. A table entry is four dwords: message address, upper
address, data, vector control (bit 0: masked). Software accesses whole dwords or quadwords.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from threading import Lock

from vmm.core.lean_typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

BAR_SIZE = 0x1000
TABLE, PENDING = 0x000, 0x800  # where the table and the pending bit array are in the BAR
MAX_VECTORS = (PENDING - TABLE) // 16

CAPABILITY = 0x11
CONTROL_ENABLE, CONTROL_MASK_ALL = 1 << 15, 1 << 14

_ENTRY = struct.Struct("<QII")
_VECTOR_CONTROL = 12
_MASKED = 1


class MessageLines(Protocol):
    """Where messages go. Neither method raises for what a guest can write."""

    def route(self, messages: Mapping[int, tuple[int, int]]) -> None:
        """From now on each of these vectors has that message: {vector: (address, data)}.

        May wait for KVM; one call at a time for a function.
        """
        ...

    def signal(self, vector: int) -> None:
        """Send the vector's message; dropped while it has no route."""
        ...


class MsixTable:
    """The registers of one function, as a device on the memory bus.

    A vector whose message is held back, by its own mask or the function's, becomes pending, and
    its message is sent when it can be.

    A guest may rewrite entries as fast as it can, and KVM's answer to a new route takes a while
    (it waits for all who may be reading the old table). So the function's own thread, the device
    loop, never waits for that: `interrupt` takes a lock that is held for moments, and a vector
    whose route is under way is pending until the thread that makes the route is done.
    """

    def __init__(self, vectors: int, lines: MessageLines) -> None:
        """Raises ValueError for more vectors than the BAR has room for."""
        if not 0 < vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} MSI-X vectors; 1 to {MAX_VECTORS} fit into the BAR")
        self.vectors = vectors
        self._lines = lines
        self._table = bytearray(16 * vectors)
        for vector in range(vectors):
            self._table[16 * vector + _VECTOR_CONTROL] = _MASKED  # 6.8.2.9: the reset state
        self._routes: list[tuple[int, int] | None] = [None] * vectors
        self._pending = 0
        self._masked_all = False
        self.settled: Callable[[], None] | None = None
        """Told, on a vCPU's thread, after each change of what `is_live` says of a vector."""
        self.enabled = False
        """Whether the function interrupts by messages, and not by INTx."""
        # For all of the above.
        self._lock = Lock()
        # Held by vCPUs alone, while routes are brought in line with the table. Taken first.
        self._routing = Lock()

    def capability(self, bar: int) -> bytes:
        """The capability's body, for the table in BAR `bar`: control, table, pending bits."""
        return struct.pack("<HII", self.vectors - 1, TABLE | bar, PENDING | bar)

    def control(self, value: int) -> None:
        """The capability's message control register now holds `value`."""
        with self._lock:
            self.enabled = bool(value & CONTROL_ENABLE)
            self._masked_all = bool(value & CONTROL_MASK_ALL)
        self._settle(range(self.vectors))
        if self.settled is not None:
            self.settled()

    def interrupt(self, vector: int) -> None:
        """The function has something to tell by that vector; unknown ones are dropped."""
        if vector >= self.vectors:
            return
        with self._lock:
            self._pending |= 1 << vector
            self._send(vector)

    def is_live(self, vector: int) -> bool:
        """Whether the vector's message may be sent, and its route is the right one."""
        if vector >= self.vectors:
            return False
        with self._lock:
            message = self._live(vector)
            return message is not None and message == self._routes[vector]

    def forget_pending(self) -> None:
        """The function was reset: what it had to tell is nobody's business any more."""
        with self._lock:
            self._pending = 0

    def state(self) -> State:
        """See vmm.core.saved.Stateful; what is enabled says the function's configuration."""
        with self._lock:
            return {"table": bytes(self._table).hex(), "pending": self._pending}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful: before the function's configuration, which routes."""
        with self._lock:
            self._table[:] = saved.bytes("table", len(self._table))
            self._pending = saved.number("pending", (1 << self.vectors) - 1)

    # --- the BAR ---

    def read(self, offset: int, size: int) -> int:
        """`size` bytes (1 to 8) at `offset`; what is neither table nor pending bits is zero."""
        with self._lock:
            if offset < PENDING:
                data = bytes(self._table[offset : offset + size])
            else:
                bits = self._pending.to_bytes((MAX_VECTORS + 7) // 8, "little")
                data = bits[offset - PENDING : offset - PENDING + size]
        return int.from_bytes(data, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Aligned dwords and quadwords inside the table; anything else is dropped."""
        if size not in (4, 8) or offset % size or offset + size > len(self._table):
            return
        with self._lock:
            self._table[offset : offset + size] = value.to_bytes(size, "little")
        self._settle((offset // 16,))
        if self.settled is not None:
            self.settled()

    def _settle(self, vectors: Iterable[int]) -> None:
        """After a change: route the live messages of `vectors` to where the table says, all of
        them by one call, and send those that are pending."""
        with self._lock:
            if not self._misrouted(vectors):
                self._send_all(vectors)
                return
        with self._routing:
            with self._lock:
                wrong = self._misrouted(vectors)  # another vCPU may have been quicker
            if wrong:
                self._lines.route(wrong)
            with self._lock:
                for vector, message in wrong.items():
                    self._routes[vector] = message
                self._send_all(vectors)

    # --- what follows is called with the lock held ---

    def _live(self, vector: int) -> tuple[int, int] | None:
        """The vector's message, None while it may not be sent."""
        address, data, control = _ENTRY.unpack_from(self._table, 16 * vector)
        if not self.enabled or self._masked_all or control & _MASKED:
            return None
        return address, data

    def _misrouted(self, vectors: Iterable[int]) -> dict[int, tuple[int, int]]:
        """The live messages whose route is another one."""
        live = {vector: self._live(vector) for vector in vectors}
        return {
            vector: message
            for vector, message in live.items()
            if message is not None and message != self._routes[vector]
        }

    def _send_all(self, vectors: Iterable[int]) -> None:
        if self._pending:
            for vector in vectors:
                self._send(vector)

    def _send(self, vector: int) -> None:
        """Send the vector's message, if it is pending, live, and its route the right one."""
        if self._pending & 1 << vector:
            message = self._live(vector)
            if message is not None and message == self._routes[vector]:
                self._pending &= ~(1 << vector)
                self._lines.signal(vector)
