"""Writes that KVM keeps back and that no exit has had carried out: found by looking."""

from __future__ import annotations

import time
from collections.abc import Callable

from vmm.core.lean_typing import Protocol

SHORTEST_SECONDS = 0.01
LONGEST_SECONDS = 1.0


class Runner(Protocol):
    """The part of VcpuRunner that is used here."""

    @property
    def oldest_coalesced_write(self) -> int | None: ...
    def carry_out_coalesced_writes(self) -> None: ...


class Stragglers:
    """Looks now and then whether a write to the serial port is stuck in KVM's ring.

    A driver that asks for the port's status after a character (Linux' do) has it carried out by
    that very exit. A guest that writes its last words and halts, or computes, makes none: what is
    still there after two looks is fetched. Looks become rare, and frequent again where they
    find something.
    """

    def __init__(
        self,
        runner: Runner,
        set_timer: Callable[[float, Callable[[], None]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`runner` is a vCPU's that the guest has started for sure, its first; `set_timer` as
        EventLoop's, on the time of `clock`."""
        self._runner = runner
        self._set_timer = set_timer
        self._clock = clock
        self._seen: int | None = None
        self._fetched = False
        self._pause = SHORTEST_SECONDS

    def look(self) -> None:
        """Look now, and from now on."""
        oldest = self._runner.oldest_coalesced_write
        is_stuck = oldest is not None and oldest == self._seen
        is_new = oldest is not None and not is_stuck and (self._seen is None or self._fetched)
        if is_stuck:
            self._runner.carry_out_coalesced_writes()
        if is_stuck and not self._fetched:
            self._pause = SHORTEST_SECONDS
        elif not is_new:
            # Nothing there; or it moves; or the thread that fetches waits for the console's reader.
            self._pause = min(2 * self._pause, LONGEST_SECONDS)
        self._fetched = is_stuck
        self._seen = oldest if is_stuck or is_new else None
        # Mostly a write is on its way: whether it moves is seen soon.
        wait = SHORTEST_SECONDS if is_new else self._pause
        self._set_timer(self._clock() + wait, self.look)
