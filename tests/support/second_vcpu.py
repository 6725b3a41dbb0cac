"""A hostile guest's other vCPU, which acts in the middle of a device's turn: at its reads.

What a real one does at any moment happens here whenever the device looks at the available ring's
index, so that every run is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.virtio_driver import VirtioQueueDriver

INDEX_READ = 4  # flags and index are read together


class SecondVcpu:
    """Moves the available index of `queue` on by `step` each time the device has read it.

    `looks` counts the reads; `also(looks)` is called after each. After `most` of them, which
    only a device that doesn't stop comes to, the test fails.
    """

    def __init__(
        self,
        memory: Any,
        queue: VirtioQueueDriver,
        *,
        start: int,
        step: int = 1,
        most: int = 20_000,
        also: Callable[[int], None] = lambda looks: None,
    ) -> None:
        self.looks = 0
        self.index = start
        self._memory = memory
        self._queue = queue
        self._step = step
        self._most = most
        self.also = also
        self._pread = memory.pread
        queue.set_available_index(start & 0xFFFF)
        memory.pread = self._read

    def _read(self, size: int, gpa: int) -> bytes:
        looked = gpa == self._queue.avail and size == INDEX_READ
        if looked:
            self.looks += 1
            assert self.looks < self._most, "the turn goes on as long as the guest likes"
        data: bytes = self._pread(size, gpa)
        if looked:
            self.also(self.looks)
            self.index += self._step
            self._queue.set_available_index(self.index & 0xFFFF)
        return data

    def stop(self) -> None:
        """The index stays where it is from now on."""
        self._memory.pread = self._pread
