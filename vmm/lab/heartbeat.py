"""The lab machine's heartbeat: it says every ten seconds that it is alive, on its serial line.

A kernel that hangs, and an emulator whose processor stands still, end no process and print
nothing; a guest that takes long looks just the same. The heartbeat tells them apart.
"""

from __future__ import annotations

import time

from vmm.core.errors import GuestFailure

SECONDS = 10
WORDS = "pyvmm-lab: alive"
_LINE = f"{WORDS}\r\n".encode()  # as the terminal's driver writes it
# Nobody took the machine's output for that long: it may have stood still only because of that.
_UNWATCHED = 5.0


class MachineStandsStill(GuestFailure):
    """The lab machine's heartbeat has stopped, and its emulator still runs (exit status 1)."""


class Heartbeat:
    """Listens on the serial line; `silence` seconds without a beat are the machine's end."""

    def __init__(self, silence: float) -> None:
        self.silence = silence
        self.beats = 0
        self._heard = self._looked = time.monotonic()

    def take_from(self, log: bytearray, added: int) -> None:
        """Takes the beats out of `log`, to which `added` bytes were just appended."""
        at = max(0, len(log) - added - len(_LINE))
        while (at := log.find(_LINE, at)) >= 0:
            del log[at : at + len(_LINE)]
            self.beats += 1
            self._heard = time.monotonic()

    def check(self) -> None:
        """To be called again and again while the output is taken; raises MachineStandsStill."""
        now = time.monotonic()
        if now - self._looked > _UNWATCHED:
            self._heard = now
        self._looked = now
        if now - self._heard > self.silence:
            raise MachineStandsStill(
                f"the lab machine stands still: no heartbeat for {self.silence:g} s, and its "
                "emulator still runs; its kernel hangs or crashed, or the emulator does"
            )
