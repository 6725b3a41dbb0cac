"""virtio-vsock in user space (virtio 1.2, 5.10): the guest's ports are Unix sockets of the host.

As with other VMMs: a program of the host connects to PATH and writes "CONNECT <port>\\n", gets
"OK <its own port>\\n", and talks to the program that listens on that port in the guest.
When the guest connects to port N of the host (CID 2), it reaches the program that listens on
PATH_N.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.suboptions import Suboptions
from vmm.core.unix_listener import UnixListener
from vmm.devices.virtio.budget import Budget
from vmm.devices.virtio.device import EXPECTED, GuestMemory, VirtioDevice
from vmm.devices.virtio.queue import Chain, QueueError, SplitQueue
from vmm.devices.virtio.segments import first, gather, scatter, take_front, total
from vmm.devices.virtio.vsock_connection import BUFFER, Broken, Connection, Outgoing
from vmm.devices.virtio.vsock_packet import HEADER_SIZE, HOST_CID, TYPE_STREAM, Header, Op

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

SYNTAX = "path=PATH[,cid=N][,process]"
RX, TX, EVENT = 0, 1, 2
QUEUE_SIZE = 128
LARGEST_DATA = 64 << 10
MOST_CONNECTIONS = 256
HOST_PLACES = 32
"""So many of them a guest can't take up with calls of its own: programs of the host get in."""
# Resets for connections that aren't there; with so many unsent, the guest is not listened to.
MOST_RESETS = 128
_MOST_SAVED = MOST_CONNECTIONS + MOST_RESETS
_BATCH = 16
# A program that connects says so in one line; one that says more is something else.
_LONGEST_LINE = 32
_FIRST_HOST_PORT = 1 << 30

_CONFIG = struct.Struct("<Q")
_EVENT = struct.Struct("<I")
_TRANSPORT_RESET = _EVENT.pack(0)
_WORD = (1 << 32) - 1
_LARGEST_TYPE = 0xFFFF
_Key = tuple[int, int]  # guest's port, host's port

Dial = Callable[[int], socket.socket]
"""Connects to the host's program for a port, without blocking. Raises OSError."""


class VirtioVsock(VirtioDevice):
    """One guest CID; the host's programs call `listener`."""

    device_id = 19
    pci_class = 0x028000  # network controller, other
    queue_sizes: Sequence[int] = (QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE)
    connections_gone = EVENT, _TRANSPORT_RESET
    """The queue and the event by which the driver learns that there are none any more (5.10.6)."""
    wants_process = False
    """Whether it is to have a process of its own."""

    def __init__(self, cid: int, listener: UnixListener) -> None:
        super().__init__()
        self._cid = cid
        self.listener = self._listener = listener
        self.dial: Dial = partial(dial, listener.path)
        self._connections: dict[_Key, Connection] = {}
        self._links: dict[int, Connection] = {}  # the same by fd
        # Host programs that haven't said yet which port they want, by fd, and what they have said.
        self._callers: dict[int, tuple[socket.socket, bytearray]] = {}
        self._events: dict[int, None] = {}  # fds that the loop has found ready
        self._resets: deque[Header] = deque()
        self._ready: dict[_Key, None] = {}  # connections that may have something for the guest
        self._next_port = _FIRST_HOST_PORT
        self._hungry = True  # the guest has buffers for more packets
        self._served = False  # the driver has enabled both queues
        # It was restored, or its process is another one, and the guest doesn't know yet: the reset
        # that it is about to hear of would take new connections, too, and the host would not learn
        # of it.
        self._has_moved = False
        # What the guest had for its address before: calls that it made then are on the ring still.
        self._former_cid: int | None = None

    def dial_by(self, dial: Dial) -> None:
        """Have connections made so from now on: where this process can't connect."""
        self.dial = dial

    def config(self) -> bytes:
        """struct virtio_vsock_config (5.10.4)."""
        return _CONFIG.pack(self._cid)

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        super().activate(memory, queues, features)
        self._hungry = True
        self._served = {RX, TX} <= queues.keys()
        if self._served:
            self._listen()

    def reset(self) -> None:
        super().reset()
        self._served = self._has_moved = False
        self._former_cid = None
        self.watch(self._listener.fd, self._no_more)
        for connection in list(self._connections.values()):
            self._drop(connection)
        for fd in list(self._callers):
            self._hang_up(fd)
        self._resets.clear()
        self._ready.clear()
        self._events.clear()

    def close(self) -> None:
        self.reset()
        self._listener.close()

    def state(self) -> State:
        """See vmm.core.saved.Stateful: without connections, whose host side doesn't come along."""
        unanswered = [
            (HOST_CID, each.host_port, each.guest_port, TYPE_STREAM)
            for each in self._connections.values()
            if Op.RESPONSE in each.answers
        ]
        resets = [(each.src_cid, each.src_port, each.dst_port, each.type) for each in self._resets]
        rows = [row for row in unanswered + resets if row[0] <= _WORD][:_MOST_SAVED]
        return {"cid": self._cid, "next_port": self._next_port, "resets": rows}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful. The guest is told that its connections are gone, and that
        it may have another CID (5.10.6, device events).

        Linux shuts down established connections then, and no others: a connect() whose answer is
        still to come waits for its own timeout. It gets a reset after the event. Established ones
        get none: Linux takes that for their end, where the event is an error
        (virtio_transport_recv_connecting, _connected; virtio_vsock_reset_sock).
        """
        former = saved.number("cid", _WORD)
        self._next_port = saved.number("next_port", _WORD)
        rows = saved.numbers("resets", 4, _MOST_SAVED, _WORD)
        if any(row[3] > _LARGEST_TYPE for row in rows):
            raise saved.bad(f"resets: a packet's type is at most {_LARGEST_TYPE:#x}")
        if self._served:
            self._former_cid = former
            self._resets += [self._reset(*row) for row in rows]
        self._forget_connections()

    def resumed(self, kept: int) -> None:
        self._forget_connections()

    def _forget_connections(self) -> None:
        """Those of the guest's that were with another device: it is told before there are more."""
        self._has_moved = EVENT in self._queues
        if self._served:
            self._listen()

    def _tell_moved(self, queue: SplitQueue) -> bool:
        """VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, as soon as there is a buffer for it."""
        assert self._memory is not None
        chains = queue.take(1) if self._has_moved else []
        if not chains:
            return False
        written = scatter(self._memory, chains[0].writable, _TRANSPORT_RESET)
        wants_interrupt = queue.publish([(chains[0].head, written)])
        self._has_moved = False
        if self._served:
            self._listen()
            self.wake(RX)
            self.wake(TX)
        return wants_interrupt

    def process(self, queue_index: int) -> bool:
        queue = self._queues[queue_index]
        if queue_index == EVENT:
            return self._tell_moved(queue)
        if not self._served or self._has_moved:
            return False  # one way only: there could be no connection
        if queue_index == RX:
            self._look_around(queue.budget)
            return self._send_packets(queue)
        if queue_index == TX:
            return self._take_packets(queue)
        return False

    # --- from the guest ---

    def _take_packets(self, queue: SplitQueue) -> bool:
        used: list[tuple[int, int]] = []
        out_of_turn = False
        try:
            while len(self._resets) < MOST_RESETS and not out_of_turn:
                chains = queue.take(min(_BATCH, MOST_RESETS - len(self._resets)))
                out_of_turn = queue.more and not chains
                for number, chain in enumerate(chains):
                    if number and queue.budget.spent:
                        queue.put_back(len(chains) - number)
                        out_of_turn = True
                        break
                    self._take_packet(chain)
                    queue.budget.spend(2 + len(chain.readable), total(chain.readable))
                    used.append((chain.head, 0))
                if not chains:
                    break
        except EXPECTED:
            queue.publish(used)
            raise
        # Where resets wait for the guest to take them, `_send_packets` will wake this queue.
        queue.more = (queue.more or out_of_turn) and len(self._resets) < MOST_RESETS
        if self._resets or self._ready:
            self.wake(RX)
        return queue.publish(used)

    def _take_packet(self, chain: Chain) -> None:
        assert self._memory is not None
        front, rest = take_front(chain.readable, HEADER_SIZE)
        header = Header.unpack(gather(self._memory, front))
        if header.length > min(total(rest), LARGEST_DATA):
            raise QueueError(f"vsock packet of {header.length} bytes does not fit its buffers")
        self.statistics.requests += 1
        if header.src_cid != self._cid:  # 5.10.6.2: not its address
            if header.src_cid == self._former_cid and header.op == Op.REQUEST:
                self._refuse(header)
            return
        if header.dst_cid != HOST_CID or header.type != TYPE_STREAM:
            self._refuse(header)
            return
        connection = self._connections.get((header.src_port, header.dst_port))
        if connection is None:
            if header.op == Op.REQUEST:
                self._guest_calls(header)
            elif header.op != Op.RST:
                self._refuse(header)
            return
        connection.credit(header)
        data = first(rest, header.length) if header.op == Op.RW else []
        content = gather(self._memory, data) if data else b""
        try:
            self._obey(connection, header, content)
        except Broken:
            self.statistics.errors += 1
            self._end(connection)
        self._has_news(connection)
        self._watch_link(connection)

    def _has_news(self, connection: Connection) -> None:
        """There may be something for the guest, if the connection is still there."""
        key = connection.guest_port, connection.host_port
        if self._connections.get(key) is connection:
            self._ready[key] = None

    def _obey(self, connection: Connection, header: Header, content: bytes) -> None:
        """One packet for a connection that is there. Raises Broken."""
        match header.op:
            case Op.RW:
                connection.receive(content)
                self.statistics.bytes_written += len(content)
            case Op.RESPONSE if not connection.established:
                connection.established = True
                with contextlib.suppress(OSError):
                    connection.link.send(b"OK %d\n" % connection.host_port, socket.MSG_NOSIGNAL)
            case Op.RST:
                # 8 s after it has closed its end Linux lets go of it (VSOCK_CLOSE_TIMEOUT). What it
                # sent before is the host's program's, however slow that is.
                if not connection.owed:
                    self._drop(connection)
            case Op.SHUTDOWN:
                connection.shut(header.flags)
                if connection.over:
                    self._end(connection)
            case Op.CREDIT_UPDATE:
                pass
            case Op.CREDIT_REQUEST:
                if Op.CREDIT_UPDATE not in connection.answers:
                    connection.answers.append(Op.CREDIT_UPDATE)
            case _:
                raise Broken(f"operation {header.op}")

    def _guest_calls(self, header: Header) -> None:
        """The guest connects to a port of the host: to the program that listens on PATH_port."""
        try:
            # Also what the host has no descriptor for is a call refused, not the device's end.
            if len(self._connections) >= MOST_CONNECTIONS - HOST_PLACES:
                raise OSError("too many connections")
            link = self.dial(header.dst_port)
        except OSError:
            self._refuse(header)
            return
        connection = self._add(link, header.src_port, header.dst_port)
        connection.credit(header)
        connection.established = True
        connection.answers.append(Op.RESPONSE)

    def _refuse(self, header: Header) -> None:
        """Answer with a reset, from where the packet was meant to go."""
        self._resets.append(
            self._reset(header.dst_cid, header.dst_port, header.src_port, header.type)
        )

    def _end(self, connection: Connection) -> None:
        """Let go of a connection, and tell the guest."""
        self._drop(connection)
        self._resets.append(
            self._reset(HOST_CID, connection.host_port, connection.guest_port, TYPE_STREAM)
        )

    def _reset(self, cid: int, port: int, guest_port: int, kind: int) -> Header:
        """A reset for the guest, from that address."""
        return Header(cid, self._cid, port, guest_port, 0, kind, Op.RST, 0, 0, 0)

    # --- to the guest ---

    def _send_packets(self, queue: SplitQueue) -> bool:
        used: list[tuple[int, int]] = []
        was_full = len(self._resets) >= MOST_RESETS
        self._hungry = True
        out_of_turn = False
        try:
            while self._resets or self._ready:
                out_of_turn = queue.budget.spent
                chains = queue.take(1)
                if not chains:
                    self._hungry = out_of_turn
                    break
                written = self._fill(chains[0])
                if written is None:
                    queue.put_back(1)
                    queue.more = False  # the loop or the guest will say when there is something
                    break
                queue.budget.spend(2 + len(chains[0].writable), written)
                used.append((chains[0].head, written))
        except EXPECTED:
            queue.publish(used)
            raise
        queue.more = queue.more or out_of_turn or (self._served and bool(self._events))
        if was_full and len(self._resets) < MOST_RESETS:
            self.wake(TX)
        for connection in self._connections.values():
            self._watch_link(connection)
        return queue.publish(used)

    def _fill(self, chain: Chain) -> int | None:
        """Put the next packet into a buffer; None when there is none after all."""
        assert self._memory is not None
        room = total(chain.writable) - HEADER_SIZE
        if room < 0:
            raise QueueError(f"vsock buffer {chain.head} has no room for a header of 44 bytes")
        if self._resets:
            return scatter(self._memory, chain.writable, self._resets.popleft().pack())
        while self._ready:
            key = next(iter(self._ready))
            connection = self._connections[key]
            del self._ready[key]
            try:
                packet = connection.next(min(room, LARGEST_DATA))
            except Broken:
                self._drop(connection)
                packet = Outgoing(Op.RST)
            else:
                if packet is None:
                    continue
                self._ready[key] = None  # its turn comes again, after the others'
            return self._write(chain, connection, packet)
        # While a buffer of a header alone is the next one, the host's data waits: nobody is to
        # tell of it.
        self._hungry = room > 0
        return None

    def _write(self, chain: Chain, connection: Connection, packet: Outgoing) -> int:
        assert self._memory is not None
        header = Header(
            HOST_CID, self._cid, connection.host_port, connection.guest_port,
            len(packet.data), TYPE_STREAM, packet.op, packet.flags, BUFFER, connection.forwarded,
        )  # fmt: skip
        self.statistics.bytes_read += len(packet.data)
        return scatter(self._memory, chain.writable, header.pack() + packet.data)

    # --- the host's programs ---

    def _happened(self, fd: int) -> None:
        """An fd is ready (on the loop's thread): looked after where the queues are locked."""
        self._events[fd] = None
        self.serve(RX)

    @staticmethod
    def _no_more() -> None:
        """For an fd that is no longer watched."""

    def _look_around(self, budget: Budget) -> None:
        """What has happened at the sockets, as far as the turn's budget goes."""
        while self._events and budget.spend(2):
            fd, _ = self._events.popitem()
            if fd == self._listener.fd:
                self._accept()
            elif fd in self._callers:
                self._hear(fd)
            elif fd in self._links:
                connection = self._links[fd]
                self._has_news(connection)
                try:
                    waiting = connection.waiting
                    connection.flush()
                    budget.spend(1, waiting)
                except Broken:
                    self._end(connection)
                    continue
                if connection.over:
                    self._end(connection)

    def _listen(self) -> None:
        """Take callers while there is room for their connections, and the guest knows that older
        ones are gone."""
        has_room = len(self._callers) + len(self._connections) < MOST_CONNECTIONS
        self.watch(
            self._listener.fd,
            partial(self._happened, self._listener.fd),
            readable=has_room and not self._has_moved,
            after=self._listener.rest,
        )

    def _accept(self) -> None:
        caller = self._listener.take()
        if caller is None:
            self._listen()
            return
        self._callers[caller.fileno()] = caller, bytearray()
        self.watch(caller.fileno(), partial(self._happened, caller.fileno()), readable=True)
        self._listen()

    def _hear(self, fd: int) -> None:
        """A caller says which port it wants; what follows that line is for the guest."""
        caller, said = self._callers[fd]
        try:
            ahead = caller.recv(_LONGEST_LINE, socket.MSG_PEEK)
            said += caller.recv(ahead.find(b"\n") + 1 or len(ahead)) if ahead else b""
        except BlockingIOError:
            return
        except OSError:
            ahead = b""
        match = re.fullmatch(rb"CONNECT ([0-9]{1,10})\n", said)
        if match is not None and int(match[1]) < 1 << 32:
            del self._callers[fd]
            self.watch(fd, self._no_more)  # until the guest has taken the call
            connection = self._add(caller, int(match[1]), self._free_port(int(match[1])))
            connection.answers.append(Op.REQUEST)
        elif said.endswith(b"\n") or not ahead or len(said) >= _LONGEST_LINE:
            self._hang_up(fd)

    def _hang_up(self, fd: int) -> None:
        self.watch(fd, self._no_more)
        self._events.pop(fd, None)
        self._callers.pop(fd)[0].close()
        self._listen_again()

    def _free_port(self, guest_port: int) -> int:
        while True:
            self._next_port = max((self._next_port + 1) % (1 << 32), _FIRST_HOST_PORT)
            if (guest_port, self._next_port) not in self._connections:
                return self._next_port

    def _add(self, link: socket.socket, guest_port: int, host_port: int) -> Connection:
        connection = Connection(link, guest_port, host_port)
        self._connections[guest_port, host_port] = connection
        self._links[connection.fd] = connection
        self._ready[guest_port, host_port] = None
        self._watch_link(connection)
        return connection

    def _drop(self, connection: Connection) -> None:
        key = connection.guest_port, connection.host_port
        if self._connections.get(key) is connection:
            del self._connections[key]
            self._ready.pop(key, None)
        if self._links.pop(connection.fd, None) is not None:
            self._events.pop(connection.fd, None)
            self.watch(connection.fd, self._no_more)
            connection.close()
            self._listen_again()

    def _listen_again(self) -> None:
        if self._served:  # else the device is being reset
            self._listen()

    def _watch_link(self, connection: Connection) -> None:
        """Wait for what the connection can use; for data only while the guest takes it."""
        if connection.fd not in self._links:
            return
        readable, writable = connection.wants()
        wanted = (readable and self._hungry, writable)
        if wanted != connection.in_loop:
            connection.in_loop = wanted
            callback = partial(self._happened, connection.fd)
            self.watch(connection.fd, callback, readable=wanted[0], writable=wanted[1])


def dial(path: str, port: int) -> socket.socket:
    """Connect, without blocking, to the program of the host that listens for a port of it. Raises
    OSError."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        link.setblocking(False)
        link.connect(f"{path}_{port}")
    except OSError:
        link.close()
        raise
    return link


def open_vsock(text: str) -> VirtioVsock:
    """The device that `--vsock TEXT` asks for. Raises UsageError."""
    words = Suboptions("--vsock", text, SYNTAX)
    path, cid = words.take("path"), words.take_number("cid", 3, (1 << 32) - 2)
    apart = words.flag("process")
    words.finish()
    if path is None:
        raise words.error("path= is missing")
    device = VirtioVsock(3 if cid is None else cid, UnixListener("--vsock path=", path))
    device.wants_process = apart
    return device
