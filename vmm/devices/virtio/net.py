"""virtio-net (virtio 1.2, 5.1): one pair of queues between the guest and a NetBackend.

struct virtio_net_hdr, in front of every frame: u8 flags, gso_type; le16 hdr_len, gso_size,
csum_start, csum_offset, num_buffers
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence

from vmm.core.errors import GuestMemoryError
from vmm.core.lean_typing import TYPE_CHECKING, Protocol
from vmm.devices.virtio.device import EXPECTED, GuestMemory, VirtioDevice
from vmm.devices.virtio.net_frames import AT_ONCE, Arrived, Frame, read_together, spread
from vmm.devices.virtio.queue import F_INDIRECT_DESC, Chain, QueueError, SplitQueue
from vmm.devices.virtio.segments import scatter, total

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
# Frames that are sent, and returned, together: a driver's that is about to fill its queue.
_MOST_SENT = 64
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
    """Whether it is to have a process of its own, where each look at guest memory is a message: it
    does without indirect tables then, and has others look for what the driver sends next."""

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

    @property
    def lacks(self) -> int:  # type: ignore[override]  # known when it has been opened
        """See VirtioDevice."""
        return F_INDIRECT_DESC if self.wants_process else 0

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        super().activate(memory, queues, features)
        if TX in queues:
            queues[TX].patience = 1 if self.wants_process else 0
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
        arrived = Arrived()
        # Without buffers there is nothing to wait for but the driver's notify.
        self._receiving = True
        more = interrupt = False
        try:
            while True:
                if queue.budget.spent:
                    more = True
                    break
                if not chains:
                    chains = queue.take(_BATCH)
                    if not chains:
                        more = queue.more
                        self._receiving = False
                        break
                frame = self._next_frame()
                if frame is None:
                    break
                queue.budget.spend(1, len(frame))  # also of those that are dropped
                if arrived.frames and arrived.size + len(frame) > AT_ONCE:
                    interrupt |= self._return_arrived(queue, arrived)
                if not self._deliver(queue, chains, arrived, frame):
                    self._held, more = frame, queue.more
                    self._receiving = False
                    break
        except EXPECTED:
            self._return_arrived(queue, arrived)
            raise
        interrupt |= self._return_arrived(queue, arrived)
        queue.put_back(len(chains))
        # A frame that waits for the next turn is not the backend's to announce.
        queue.more = more
        self._watch_backend()
        return interrupt

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
        self, queue: SplitQueue, chains: list[Chain], arrived: Arrived, frame: bytes
    ) -> bool:
        """Give one frame the next buffers; without F_MRG_RXBUF the next one only.

        False where it takes more buffers than there are now; one that can never fit is dropped.
        """
        chain = chains[0]
        room = total(chain.writable)
        if room < HEADER_SIZE:
            raise QueueError(f"receive buffer {chain.head} has no room for a header of 12 bytes")
        count = 1
        out_of_turn = False
        while room < len(frame) and self._agreed & F_MRG_RXBUF:
            if count == len(chains):
                chains += queue.take(_BATCH)
                if count == len(chains):
                    out_of_turn = queue.more
                    break
            room += total(chains[count].writable)
            count += 1
        if room < len(frame):
            # Buffers in which not even a turn of their own finds room are no buffers.
            is_short = arrived.any_yet or not out_of_turn
            if self._agreed & F_MRG_RXBUF and count < queue.size and is_short:
                return False
            self.statistics.errors += 1
            return True
        taken = chains[:count]
        del chains[:count]
        number = _NUM_BUFFERS.pack(count)
        arrived.add(taken, frame[:_NUM_BUFFERS_AT] + number + frame[HEADER_SIZE:])
        queue.budget.spend(count + sum([len(one.writable) for one in taken]), len(frame))
        return True

    def _return_arrived(self, queue: SplitQueue, arrived: Arrived) -> bool:
        """Frames, and the buffers that they are in: by one call, where the memory takes batches.
        Whether the driver wants an interrupt."""
        memory, frames = self._memory, arrived.take()
        assert memory is not None
        if not frames:
            return False
        if hasattr(memory, "write_many"):
            outstanding = queue.outstanding
            used: list[tuple[int, int]] = []
            pieces: list[int] = []
            for chains, frame in frames:
                used += spread(chains, len(frame), pieces)
            self._count_received(frames)
            try:
                return queue.publish(used, pieces, b"".join([frame for _, frame in frames]))
            except (GuestMemoryError, OSError):
                if queue.outstanding != outstanding:  # the driver has been told
                    raise
                self._count_received(frames, -1)
        return self._return_one_by_one(queue, memory, frames)

    def _return_one_by_one(
        self, queue: SplitQueue, memory: GuestMemory, frames: list[Frame]
    ) -> bool:
        """As far as they can be written: the first that can't stops the device."""
        used: list[tuple[int, int]] = []
        try:
            for chains, frame in frames:
                written = spread(chains, len(frame))
                done = 0
                for chain, (_, size) in zip(chains, written, strict=True):
                    scatter(memory, chain.writable, frame[done : done + size])
                    done += size
                used += written
                self._count_received([(chains, frame)])
        except EXPECTED:
            queue.publish(used)
            raise
        return queue.publish(used)

    def _count_received(self, frames: list[Frame], sign: int = 1) -> None:
        self.statistics.requests += sign * len(frames)
        size = sum([len(frame) - HEADER_SIZE for _, frame in frames])
        self.statistics.bytes_read += sign * size

    # --- from the guest to the backend ---

    def _transmit(self, queue: SplitQueue) -> bool:
        used: list[tuple[int, int]] = []
        if not self._flushed():
            self._watch_backend()
            return False
        assert self._memory is not None
        budget = queue.budget
        chains = queue.take(_MOST_SENT)
        more = queue.more
        try:
            for chain, frame in read_together(self._memory, chains, self._is_frame):
                if used and budget.spent:
                    more = True
                    break
                if not self._send(chain, frame):
                    self._waiting_for_room = True
                    break
                budget.spend(1 + len(chain.readable), total(chain.readable))
                used.append((chain.head, 0))
        except EXPECTED:
            queue.publish(used)
            raise
        queue.put_back(len(chains) - len(used))
        if not self._waiting_for_room:
            self._flushed()  # the last frame may be half on its way
        # With a turn's worth sent there may be more; without room, the backend's fd will tell.
        queue.more = more and not self._waiting_for_room
        self._watch_backend()
        return queue.publish(used)

    def _is_frame(self, size: int) -> bool:
        """An empty frame is none, and nothing that a backend should be given."""
        return self._link_up and HEADER_SIZE < size <= HEADER_SIZE + LARGEST_FRAME

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

    def _send(self, chain: Chain, frame: bytes | memoryview | None) -> bool:
        """Hand one frame to the backend; False when it has to wait."""
        size = total(chain.readable)
        if size < HEADER_SIZE:
            raise QueueError(f"frame {chain.head} is shorter than its header of 12 bytes")
        if frame is None or not self._link_up:
            self.statistics.errors += 1
            return True
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

    def _header(self, frame: bytes | memoryview) -> bytes:
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
