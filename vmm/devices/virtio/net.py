"""virtio-net (virtio 1.2, 5.1): one pair of queues between the guest and a NetBackend.

struct virtio_net_hdr, in front of every frame: u8 flags, gso_type; le16 hdr_len, gso_size,
csum_start, csum_offset, num_buffers
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence

from vmm.core.lean_typing import TYPE_CHECKING, Protocol
from vmm.devices.virtio.device import EXPECTED, GuestMemory, VirtioDevice
from vmm.devices.virtio.queue import Chain, QueueError, SplitQueue
from vmm.devices.virtio.segments import gather, scatter, total

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

F_CSUM, F_GUEST_CSUM = 1 << 0, 1 << 1
F_MAC, F_GUEST_TSO4, F_GUEST_TSO6 = 1 << 5, 1 << 7, 1 << 8
F_HOST_TSO4, F_HOST_TSO6 = 1 << 11, 1 << 12
F_MRG_RXBUF, F_STATUS = 1 << 15, 1 << 16

RX, TX = 0, 1
QUEUE_SIZE = 256
HEADER_SIZE = 12
MAC_BYTES = 6
_HEADER = struct.Struct("<BBHHHHH")
_NO_HEADER = bytes(HEADER_SIZE)
_NUM_BUFFERS = struct.Struct("<H")
_NUM_BUFFERS_AT = 10
STATUS_LINK_UP = 1
_CONFIG = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu

LARGEST_FRAME = 65535 + 18  # an IP packet of 64 KiB less one, Ethernet header, VLAN tag
NEEDS_CSUM = 1  # header flag
GSO_NONE, GSO_TCPV4, GSO_TCPV6 = 0, 1, 4
# Buffers looked at together: few frames come alone or in hundreds.
_BATCH = 32
_FOR_A_MOMENT = (errno.ENOMEM, errno.ENOBUFS, errno.EINTR)
"""What says nothing against the backend: the next try may go well."""
_A_MOMENT = 0.01
"""Seconds until that next try: what is ready stays ready meanwhile, and would be tried at once."""


def may_be_mac(mac: bytes) -> bool:
    """Whether a card may have that address."""
    return not mac[0] & 1 and any(mac)


class NetBackend(Protocol):
    """Where frames go and come from. Each begins with a virtio_net_hdr of HEADER_SIZE bytes."""

    fd: int
    features: int
    """Offloads that the backend can carry out."""
    is_stream: bool
    """Whether frames follow each other on a connection, so that nobody else can take it up."""

    def set_offloads(self, features: int) -> None:
        """What the driver agreed to."""
        ...

    def receive(self) -> bytes | None:
        """One frame, or None when there is none now. OSError: there will never be one again."""
        ...

    def send(self, frame: bytes) -> bool:
        """Take one frame; False when there is no room for it now. OSError: it can't be sent;
        ConnectionError: nor can any other, ever."""
        ...

    def flush(self) -> bool:
        """Send on what an earlier `send` has taken; True when all is on its way."""
        ...

    def close(self) -> None: ...


class VirtioNet(VirtioDevice):
    """A network card. A frame that the other side can't take is dropped, as networks do."""

    device_id = 1
    pci_class = 0x020000  # Ethernet controller
    queue_sizes: Sequence[int] = (QUEUE_SIZE, QUEUE_SIZE)
    wants_process = False
    """Whether it is to have a process of its own."""

    def __init__(self, backend: NetBackend, mac: bytes, *, mac_given: bool = False) -> None:
        """`mac_given`: the user has chosen it."""
        super().__init__()
        self.backend = self._backend = backend
        self._mac = mac
        self._mac_given = mac_given
        self._link_up = True
        self._receiving = self._waiting_for_room = False
        self._held: bytes | None = None  # a frame that waits for more buffers
        self._rest = 0.0  # before the backend is tried again, in seconds
        self.features = F_MAC | F_STATUS | F_MRG_RXBUF | backend.features

    def config(self) -> bytes:
        """struct virtio_net_config up to mtu (5.1.4)."""
        return self.config_with(link_up=self._link_up)

    def config_with(self, *, link_up: bool) -> bytes:
        """What `config` is with a link, or without one."""
        return _CONFIG.pack(self._mac, STATUS_LINK_UP if link_up else 0, 1, 0)

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        super().activate(memory, queues, features)
        self._backend.set_offloads(features & self._backend.features)
        self._receiving = RX in queues and self._link_up
        self._watch_backend()

    def reset(self) -> None:
        super().reset()
        self._receiving = self._waiting_for_room = False
        self._held = None
        self._watch_backend()

    def state(self) -> State:
        """See vmm.core.saved.Stateful; a frame that waits for buffers is lost, as networks do."""
        return {"mac": self._mac.hex()}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful: the driver knows the card by its address. Its link is up,
        whatever it was: the backend is another one."""
        mac = saved.bytes("mac", MAC_BYTES)
        if not may_be_mac(mac):
            raise saved.bad(f"mac {mac.hex(':')} is a multicast or empty address")
        if self._mac_given and mac != self._mac:
            raise saved.bad(
                f"its card has the address {mac.hex(':')}, and --net says mac={self._mac.hex(':')};"
                " leave mac= out"
            )
        self._mac = mac

    def close(self) -> None:
        self.watch(self._backend.fd, self._ready)
        self._backend.close()

    def process(self, queue_index: int) -> bool:
        queue = self._queues[queue_index]
        return self._receive(queue) if queue_index == RX else self._transmit(queue)

    def _ready(self) -> None:
        if self._receiving:
            self.serve(RX)
        if self._waiting_for_room:
            self.serve(TX)

    def _watch_backend(self) -> None:
        self.watch(
            self._backend.fd,
            self._ready,
            readable=self._receiving and self._link_up,
            writable=self._waiting_for_room and self._link_up,
            after=self._rest,
        )
        self._rest = 0.0

    def _lost(self) -> None:
        """The backend is gone: the guest sees a cable pulled."""
        if self._link_up:
            self.config_is_news = True
            self.statistics.errors += 1
        self._link_up = False
        self._waiting_for_room = False

    # --- from the backend to the guest ---

    def _receive(self, queue: SplitQueue) -> bool:
        chains: list[Chain] = []
        used: list[tuple[int, int]] = []
        # Without buffers there is nothing to wait for but the driver's notify.
        self._receiving = True
        more = False
        try:
            while True:
                if queue.budget.spent:
                    more = True
                    break
                if len(used) == len(chains):
                    chains += queue.take(_BATCH)
                    if len(used) == len(chains):
                        more = queue.more
                        self._receiving = False
                        break
                frame = self._next_frame()
                if frame is None:
                    break
                queue.budget.spend(1, len(frame))  # also of those that are dropped
                if not self._deliver(queue, chains, used, frame):
                    self._held, more = frame, queue.more
                    self._receiving = False
                    break
        except EXPECTED:
            queue.publish(used)
            raise
        queue.put_back(len(chains) - len(used))
        # A frame that waits for the next turn is not the backend's to announce.
        queue.more = more
        self._watch_backend()
        return queue.publish(used)

    def _next_frame(self) -> bytes | None:
        if self._held is not None:
            frame, self._held = self._held, None
            return frame
        try:
            return self._backend.receive() if self._link_up else None
        except OSError as error:
            if error.errno in _FOR_A_MOMENT:
                self._rest = _A_MOMENT
            else:
                self._lost()
            return None

    def _deliver(
        self, queue: SplitQueue, chains: list[Chain], used: list[tuple[int, int]], frame: bytes
    ) -> bool:
        """Write one frame over the next buffers; without F_MRG_RXBUF over the next one only.

        False where it takes more buffers than there are now; one that can never fit is dropped.
        """
        assert self._memory is not None
        chain = chains[len(used)]
        room = total(chain.writable)
        if room < HEADER_SIZE:
            raise QueueError(f"receive buffer {chain.head} has no room for a header of 12 bytes")
        taken = [chain]
        out_of_turn = False
        while room < len(frame) and self._agreed & F_MRG_RXBUF:
            if len(used) + len(taken) == len(chains):
                chains += queue.take(_BATCH)
                if len(used) + len(taken) == len(chains):
                    out_of_turn = queue.more
                    break
            taken.append(chains[len(used) + len(taken)])
            room += total(taken[-1].writable)
        if room < len(frame):
            # Buffers in which not even a turn of their own finds room are no buffers.
            if self._agreed & F_MRG_RXBUF and len(taken) < queue.size and (used or not out_of_turn):
                return False
            self.statistics.errors += 1
            return True
        count = _NUM_BUFFERS.pack(len(taken))
        data = memoryview(frame[:_NUM_BUFFERS_AT] + count + frame[HEADER_SIZE:])
        done = 0
        for chain in taken:
            written = scatter(self._memory, chain.writable, data[done:])
            queue.budget.spend(1 + len(chain.writable), written)
            used.append((chain.head, written))
            done += written
        self.statistics.requests += 1
        self.statistics.bytes_read += len(frame) - HEADER_SIZE
        return True

    # --- from the guest to the backend ---

    def _transmit(self, queue: SplitQueue) -> bool:
        used: list[tuple[int, int]] = []
        if not self._flushed():
            self._watch_backend()
            return False
        budget = queue.budget
        more = False
        try:
            while not (more or self._waiting_for_room):
                chains = queue.take(_BATCH)
                more = queue.more and not chains
                for number, chain in enumerate(chains):
                    more = number > 0 and budget.spent
                    if more or not self._send(chain):
                        self._waiting_for_room = not more
                        queue.put_back(len(chains) - number)
                        break
                    budget.spend(1 + len(chain.readable), total(chain.readable))
                    used.append((chain.head, 0))
                if not chains:
                    break
        except EXPECTED:
            queue.publish(used)
            raise
        if not self._waiting_for_room:
            self._flushed()  # the last frame may be half on its way
        # With a turn's worth sent there may be more; without room, the backend's fd will tell.
        queue.more = more and not self._waiting_for_room
        self._watch_backend()
        return queue.publish(used)

    def _flushed(self) -> bool:
        self._waiting_for_room = False
        try:
            self._waiting_for_room = self._link_up and not self._backend.flush()
        except OSError as error:
            if error.errno in _FOR_A_MOMENT:
                self._waiting_for_room = True
                self._rest = _A_MOMENT
            else:
                self._lost()
        return not self._waiting_for_room

    def _send(self, chain: Chain) -> bool:
        """Hand one frame to the backend; False when it has to wait."""
        assert self._memory is not None
        size = total(chain.readable)
        if size < HEADER_SIZE:
            raise QueueError(f"frame {chain.head} is shorter than its header of 12 bytes")
        # An empty frame is none, and nothing that a backend should be given.
        fits = HEADER_SIZE < size <= HEADER_SIZE + LARGEST_FRAME
        if not fits or not self._link_up:
            self.statistics.errors += 1
            return True
        frame = gather(self._memory, chain.readable)
        try:
            if not self._backend.send(self._header(frame) + frame[HEADER_SIZE:]):
                return False
        except ConnectionError:  # the other side is gone
            self._lost()
            return True
        except OSError:  # a frame that the backend doesn't take is lost
            self.statistics.errors += 1
            return True
        self.statistics.requests += 1
        self.statistics.bytes_written += size - HEADER_SIZE
        return True

    def _header(self, frame: bytes) -> bytes:
        """The frame's header as the backend gets it: nothing in it that was not agreed on, and no
        bit that only a device may set (5.1.6.2)."""
        flags, kind, length, size, start, offset, _ = _HEADER.unpack_from(frame)
        agreed = self._agreed
        if not (agreed & F_CSUM and flags & NEEDS_CSUM):
            return _NO_HEADER  # 5.1.6.2: segments need their checksums computed
        offload = {GSO_TCPV4: F_HOST_TSO4, GSO_TCPV6: F_HOST_TSO6}.get(kind, 0)
        if not agreed & offload:
            kind = length = size = 0
        return _HEADER.pack(NEEDS_CSUM, kind, length, size, start, offset, 0)
