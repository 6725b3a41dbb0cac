"""What a virtio device is to its transport, and what every device counts for the report.

A device file has one shape: constants of its section of the virtio specification, one class
with these members, one method per kind of request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from vmm.devices.virtio.queue import SplitQueue


class GuestMemory(Protocol):
    """Guest memory by guest-physical address, as devices need it.

    Every method raises a GuestMemoryError (UnmappedAccess, PrivateAccess) before a byte moves.
    The transfers go from fd to fd and return the bytes moved, short only at the end of a file.
    """

    def pread(self, size: int, gpa: int) -> bytes: ...

    def pwrite(self, data: bytes, gpa: int) -> None: ...

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int: ...

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int: ...


class IoStatistics:
    """What the report says of a device. `errors`: requests answered with an error, and broken
    rings; `refused`: accesses to memory that is private or not there."""

    def __init__(self) -> None:
        self.requests = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.flushes = 0
        self.errors = 0
        self.refused = 0

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))


class VirtioDevice(Protocol):
    """The device behind a transport.

    `features` leaves out the transport's own bits. Memory and queues exist for the device from
    `activate` (the driver's DRIVER_OK) to `reset`, and the transport serialises all calls.
    """

    device_id: int
    pci_class: int
    features: int
    queue_sizes: Sequence[int]
    statistics: IoStatistics

    def config(self) -> bytes:
        """The device configuration structure."""
        ...

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        """Start with the queues that the driver enabled, by index, and the features agreed."""
        ...

    def process(self, queue_index: int) -> bool:
        """Serve what is available on a queue now; True when the driver wants an interrupt.

        QueueError and GuestMemoryError mean that the device needs a reset.
        """
        ...

    def reset(self) -> None:
        """Forget memory, queues and negotiated features."""
        ...
