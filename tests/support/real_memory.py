"""Real guest memory with FakeMemory's verbs."""

from __future__ import annotations

import os
from typing import cast

from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.engines import make_engine
from vmm.memory.guest_memory import GuestMemory

VERBS = (
    "pread", "pwrite", "transfer_in", "transfer_out", "discard",
    "read_many", "write_many", "move_in", "move_out",
)  # fmt: skip
"""What a device does to guest memory."""


class RealMemory:
    """FakeMemory's verbs on guest memory, as a disk gets it: through an engine."""

    def __init__(self, guest: GuestMemory) -> None:
        self.size = guest.ram[-1].end
        self._fd = cast(MemfdBacking, guest.shared).fd
        self._engine = make_engine("auto", guest.shared)
        through = guest.through(self._engine)
        for verb in VERBS:
            setattr(self, verb, getattr(through, verb))

    def peek(self, size: int, gpa: int) -> bytes:
        return os.pread(self._fd, size, gpa)

    def poke(self, data: bytes, gpa: int) -> None:
        os.pwrite(self._fd, data, gpa)

    def close(self) -> None:
        self._engine.close()
