"""A model of pKVM for tests on any machine: what a guest keeps private fails in copying system
calls with EFAULT, because those pages of the VMM's mapping are inaccessible."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvm_bindings import fdops
from tests.support.memory import SMALL_RAM
from vmm.core.ranges import Range
from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking
from vmm.memory.observed_memory import ObservedMemory


class ProtectedGuest:
    """The guest's side: an fd of its own to the same memory, and which pages it keeps."""

    def __init__(self, backing: ProtectedMemfdBacking) -> None:
        """Before the backing is sealed; the guest keeps nothing yet."""
        self._backing = backing
        self.fd = os.dup(backing.fd)

    def unshare(self, *areas: Range) -> None:
        for area in areas:
            fdops.protect(self._backing.hva + area.start, area.size, fdops.PROT_NONE)

    def share(self, *areas: Range) -> None:
        for area in areas:
            both = fdops.PROT_READ | fdops.PROT_WRITE
            fdops.protect(self._backing.hva + area.start, area.size, both)

    def poke(self, data: bytes, gpa: int) -> None:
        assert os.pwrite(self.fd, data, gpa) == len(data)

    def peek(self, size: int, gpa: int) -> bytes:
        return os.pread(self.fd, size, gpa)

    def close(self) -> None:
        os.close(self.fd)


@contextmanager
def protected_memory(
    *private: Range, ram: tuple[Range, ...] = SMALL_RAM
) -> Iterator[tuple[ObservedMemory, ProtectedGuest]]:
    """Launched memory, of which the guest keeps `private`."""
    backing = ProtectedMemfdBacking(ram[-1].end)
    guest = ProtectedGuest(backing)
    memory = ObservedMemory(ram, backing)
    memory.launched()
    guest.unshare(*private)
    try:
        yield memory, guest
    finally:
        memory.close()
        guest.close()
