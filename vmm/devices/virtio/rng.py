"""virtio-rng (virtio 1.2, 5.4): the host's random bytes, from getrandom(2)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import Chain
from vmm.devices.virtio.segments import first, scatter, total

QUEUE_SIZE = 64
# A buffer gets so much at most, whatever its size: the device loop has other things to do.
MOST_BYTES = 64 << 10


class VirtioRng(VirtioDevice):
    """One queue of buffers to fill."""

    device_id = 4
    pci_class = 0xFF0000  # fits no class
    queue_sizes: Sequence[int] = (QUEUE_SIZE,)

    def process(self, queue_index: int) -> bool:
        return self.answer_all(self._queues[queue_index], self._fill)

    def _fill(self, chain: Chain) -> int:
        assert self._memory is not None
        self.statistics.requests += 1
        size = min(total(chain.writable), MOST_BYTES)
        data = os.getrandom(size)
        written = scatter(self._memory, first(chain.writable, len(data)), data)
        self.statistics.bytes_read += written
        self._queues[0].budget.spend(1 + len(chain.writable), written)
        return written
