"""A device whose queues another process serves, connected to KVM: no byte of it comes through here.

The guest's notify is an ioeventfd that the other process reads, and what it writes to is an irqfd
for the queue's message, as long as the guest has one that may be sent. Else (INTx, a masked vector)
the device loop reads it and interrupts the guest as for any other device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from threading import Lock

from kvm_bindings import KvmError, Vm
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.ranges import Range
from vmm.devices.vhost_user.device import VhostUserDevice, Wires
from vmm.devices.vhost_user.messages import MOST_REGIONS, Region
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.pci_transport import VirtioPciTransport
from vmm.memory.guest_memory import GuestMemory
from vmm.wiring.interrupts import MsixMessages, open_eventfd
from vmm.wiring.notifications import QueueNotifier

if TYPE_CHECKING:
    from vmm.devices.msix import MsixTable

_USER_ADDRESSES = 1 << 40
"""Added to a guest address it is what the back end knows the place by: no address of ours."""


class ForwardingNotifier(QueueNotifier):
    """The eventfds are another process' to read; the device watches them when that is gone."""

    def serve(self, notify: Callable[[int], None]) -> None:
        """Nobody here is called."""

    @property
    def eventfds(self) -> Sequence[int]:
        """One for each queue, that KVM signals."""
        return self._eventfds


class Calls:
    """The eventfds by which a back end interrupts, one for each queue, and KVM's part in it.

    Where KVM has an irqfd on one it takes each signal before the loop can see it; what came while
    it had none is sent when it gets one.
    """

    def __init__(
        self,
        vm: Vm,
        queues: int,
        table: MsixTable | None,
        messages: MsixMessages | None,
        vector_of: Callable[[int], int],
        opened: ExitStack,
    ) -> None:
        self._vm = vm
        self._table = table
        self._messages = messages
        self._vector_of = vector_of
        self.eventfds = [open_eventfd(opened) for _ in range(queues)]
        self._bound: dict[int, int] = {}  # queue to GSI
        self._wanted = False
        # Held while KVM is waited for: by vCPUs, and by the loop when a back end comes or goes.
        self._lock = Lock()
        if table is not None:
            table.settled = self._settle

    def connect(self) -> None:
        """A back end is at work. Never raises: where KVM has no room, the loop does it."""
        self._wanted = True
        self._settle()

    def disconnect(self) -> None:
        """No signal reaches the guest by itself any more."""
        self._wanted = False
        self._settle()

    def _settle(self) -> None:
        """Bring KVM's irqfds in line with what the guest has set up."""
        if not (self._wanted or self._bound):
            return
        with self._lock:
            for queue, eventfd in enumerate(self.eventfds):
                wanted = self._gsi(queue)
                bound = self._bound.get(queue)
                if wanted == bound:
                    continue
                if bound is not None:
                    self._vm.irqfd(eventfd, bound, deassign=True)
                    del self._bound[queue]
                if wanted is not None:
                    with suppress(KvmError):
                        self._vm.irqfd(eventfd, wanted)
                        self._bound[queue] = wanted

    def _gsi(self, queue: int) -> int | None:
        if not self._wanted or self._table is None or self._messages is None:
            return None
        vector = self._vector_of(queue)
        return self._messages.gsi(vector) if self._table.is_live(vector) else None


def wire(
    device: VirtioDevice,
    vm: Vm,
    memory: GuestMemory,
    transport: VirtioPciTransport,
    notifier: QueueNotifier,
    table: MsixTable | None,
    messages: MsixMessages | None,
    opened: ExitStack,
) -> None:
    """Give the device its eventfds, and what its back end is to map."""
    assert isinstance(device, VhostUserDevice) and isinstance(notifier, ForwardingNotifier)
    queues = len(device.queue_sizes)
    calls = Calls(vm, queues, table, messages, transport.vector_of, opened)
    device.wire(
        Wires(
            memory.shared.fd,
            regions_of(memory.ram, memory.common, memory.shared_bit),
            notifier.eventfds,
            calls.eventfds,
            calls.connect,
            calls.disconnect,
        )
    )


def regions_of(ram: Sequence[Range], common: Range, shared_bit: int = 0) -> list[Region]:
    """RAM but for common pages, which are private and lie in the shared file all the same.

    `shared_bit`: what guest addresses of the shared side carry.
    """
    found = [
        Region(own.start | shared_bit, own.size, own.start + _USER_ADDRESSES, own.start)
        for area in ram
        for own in (area.without(common) if common.size else [area])
    ]
    assert len(found) <= MOST_REGIONS
    return found
