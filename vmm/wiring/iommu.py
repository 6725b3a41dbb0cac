"""Guest memory as devices see it that the guest's virtual IOMMU stands before."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from vmm.core.ranges import Range
from vmm.devices.virtio.device import GuestMemory as GuestMemoryOfDevice
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.iommu import VirtioIommu, translates_for
from vmm.memory.engines import make_engine
from vmm.memory.guest_memory import GuestMemory
from vmm.memory.lending import IommuMemory, LendingMemory

if TYPE_CHECKING:
    from vmm.devices.virtio.watched import Announce
    from vmm.memory.engines import Engine


def endpoint_number(slot: int) -> int:
    """A function's number in the guest's requests: its PCI address (bus 0, function 0)."""
    return slot << 3


def memory_behind(
    iommu: VirtioIommu,
    memory: GuestMemory,
    name: str,
    slot: int,
    device: VirtioDevice,
    engine: Engine | None,
    announce: Announce | None,
    opened: ExitStack,
) -> tuple[GuestMemoryOfDevice, Announce | None, Engine | None]:
    """What the device gets in the place of `memory`, what is told of its accesses, and what moves
    the bytes of its file to and from private memory.

    `engine` moves the bytes of its file to and from shared memory; the one for private memory is
    made here, and closed by `opened`. Raises HostError, as make_engine does.
    """
    if not translates_for(device):
        return (memory if engine is None else memory.through(engine)), announce, None
    assert isinstance(memory, LendingMemory)
    engines = lending = None
    if engine is not None:
        if memory.lends and memory.private is not None:
            # Whatever was named for shared memory: the private side has the ways that it has.
            lending = make_engine("auto", memory.private, may_be_buffer=False)
            opened.callback(lending.close)
        engines = engine, lending
    behind = IommuMemory(memory, iommu.endpoint(name, endpoint_number(slot)), engines)
    if announce is None:
        return behind, None, lending

    def tell(area: Range, is_write: bool, named: str | None) -> None:
        # Policies know guest-physical addresses. What isn't mapped, the access itself refuses.
        for piece in behind.pieces_of(*area):
            announce(piece, is_write, named)

    return behind, tell, lending
