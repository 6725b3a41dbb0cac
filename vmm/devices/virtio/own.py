"""A virtio device of the user's own: what a driver asks goes in, what it is answered comes out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from vmm.core.own_code import ExtensionError, called
from vmm.core.saved import NotSaved, State
from vmm.devices.virtio import device
from vmm.devices.virtio.queue import Chain, QueueError
from vmm.devices.virtio.segments import first, gather, scatter, total

MOST_BYTES = 1 << 20
"""A request has this many bytes at most, and an answer: the device loop serves others, too."""


class VirtioDevice(device.VirtioDevice):
    """Queues of requests, each answered by bytes. Memory, rings, budgets, notifications and
    interrupts are pyvmm's business.

        class Dice(vmm.VirtioDevice):
            device_id = 4  # to its driver this is virtio-rng

            def answer(self, queue: int, request: bytes, room: int) -> bytes:
                return bytes(random.randrange(1, 7) for _ in range(room))

    `device_id` is the number of virtio 1.2, section 5, `queue_sizes` has a power of two for each
    queue, `features` the bits of the device's own that are offered. Without `answer` this is as
    the devices that pyvmm has: whoever needs more than requests and answers overrides `process`,
    `config` and `write_config` of vmm.devices.virtio.device.VirtioDevice.
    """

    name = ""
    """What reports call it; by default its class's name in small letters."""
    pci_class = 0xFF0000  # fits no class
    queue_sizes: Sequence[int] = (64,)

    @abstractmethod
    def answer(self, queue: int, request: bytes, room: int) -> bytes:
        """What the driver is answered that put `request` into that queue: at most `room` bytes.

        On the device loop's thread: the guest's other devices wait meanwhile.
        """

    def process(self, queue_index: int) -> bool:
        """See vmm.devices.virtio.device.VirtioDevice.process."""
        queue = self._queues[queue_index]

        def carry_out(chain: Chain) -> int:
            return self._carry_out(queue_index, chain)

        return self.answer_all(queue, carry_out)

    def state(self) -> State:
        """Who overrides this, and `restore`, has a device that snapshots keep."""
        name = self.name or type(self).__name__
        raise NotSaved(f"device {name} is the user's own and has no state() to save it by")

    def _carry_out(self, index: int, chain: Chain) -> int:
        memory = self._memory
        assert memory is not None
        size = total(chain.readable)
        if size > MOST_BYTES:
            raise QueueError(f"a request of {size} bytes; {MOST_BYTES} at most are taken")
        room = min(total(chain.writable), MOST_BYTES)
        request = gather(memory, chain.readable) if chain.readable else b""
        answer = called(self, "answer", self.answer, index, request, room)
        if not isinstance(answer, bytes | bytearray) or len(answer) > room:
            what = repr(answer) if not isinstance(answer, bytes) else f"{len(answer)} bytes"
            raise ExtensionError(
                f"{type(self).__name__}: answer returned {what}; return bytes, {room} at most",
                self,
            )
        written = scatter(memory, first(chain.writable, len(answer)), answer)
        self.statistics.moved(1, written, size)
        calls = 1 + len(chain.readable) + len(chain.writable)
        self._queues[index].budget.spend(calls, size + written)
        return written
