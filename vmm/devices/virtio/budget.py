"""What one turn of a device may cost, whatever the guest asks for.

All devices share one loop with the control socket, the console, signals and timers. A turn is a
call of `VirtioDevice.process`; each queue has one budget, filled up at its turns' starts. Code
that does work for the guest says what it was. When the budget is spent the device returns, and its
queue is rung again, behind all others that are ready.

A request of any size is cut into steps of which none takes longer than a turn should: what is
left of it is kept with the queue (`SplitQueue.unfinished`), and goes on in the next turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

TURN_DESCRIPTORS = 2048
"""Descriptors read: one or two milliseconds."""
TURN_CALLS = 2048
"""System calls made one by one from Python: as long."""
TURN_BYTES = 16 << 20
"""Bytes moved by the host."""
TURN_SECONDS = 0.003
"""For what is slower than all that: a disk that has to be waited for, memory given up."""
LOOK_EVERY = 16
"""Steps, of a call or 16 KiB each, between two looks at the clock."""

_STEP_SHIFT = 14

Work = Generator[None, None, int]
"""A request that is carried out in steps: it yields where the turn's budget is spent, to be gone
on with in the next turn, and returns how many bytes it wrote to the guest."""


class Budget:
    """What is left of a turn. Not locked: it belongs to a queue, as its turns do."""

    __slots__ = ("_calls", "_clock", "_deadline", "_size", "_steps", "descriptors_left", "spent")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """A turn starts."""
        self.descriptors_left = TURN_DESCRIPTORS
        """Those that `SplitQueue.take` may still read, which counts them."""
        self._calls = TURN_CALLS
        self._size = TURN_BYTES
        self._steps = LOOK_EVERY
        self._deadline = self._clock() + TURN_SECONDS
        self.spent = False
        """Whether the turn has to end, at the next place where it can."""

    def left_to_take(self) -> tuple[int, int]:
        """How many descriptors may still be read, and of requests for how many bytes: no more
        than the turn can carry out."""
        return (0 if self.spent or self._size <= 0 else self.descriptors_left), self._size

    def spend(self, calls: int = 1, size: int = 0) -> bool:
        """So many system calls were made, which moved `size` bytes; whether the turn may go on."""
        self._calls -= calls
        self._size -= size
        self._steps -= calls + (size >> _STEP_SHIFT)
        if self._steps <= 0:
            self._steps = LOOK_EVERY
            return self.look()
        if self._calls <= 0 or self._size <= 0:
            self.spent = True
        return not self.spent

    def look(self) -> bool:
        """Look at the clock, after something that may have taken long; whether to go on."""
        if self._calls <= 0 or self._size <= 0 or self._clock() >= self._deadline:
            self.spent = True
        return not self.spent

    @property
    def size_left(self) -> int:
        """How many bytes the turn may still move."""
        return max(self._size, 0)


class Pace:
    """How much one uninterrupted call may be asked to do: less of it where the host is slow.

    A cost is bytes, plus EACH for every request: a disk may have to be waited for with each. MOST
    is what a queue of large requests needs to be as quick as without bounds: four of 1 MiB. It
    begins with one.
    """

    EACH = 32 << 10
    LEAST, MOST = 64 << 10, (4 << 20) + 4 * EACH
    FIRST = MOST // 4
    SLOW = TURN_SECONDS

    __slots__ = ("limit",)

    def __init__(self) -> None:
        self.limit = self.FIRST

    def took(self, cost: int, seconds: float) -> None:
        """A call of that cost took so long. Safe from several threads: any answer will do."""
        limit = self.limit
        if seconds > self.SLOW:
            self.limit = max(self.LEAST, min(limit, cost) // 2)
        elif limit < self.MOST and 2 * cost >= limit and 2 * seconds < self.SLOW:
            self.limit = min(2 * limit, self.MOST)
