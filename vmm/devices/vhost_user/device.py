"""A virtio device whose queues another process serves (vhost-user.rst, "Communication").

The driver's registers are the transport's, as with every device. When the driver is up, the back
end gets the shared memory, the rings' places and two eventfds for each queue: KVM writes to one
when the guest notifies, the back end to the other when the guest is to be interrupted.

A back end that is gone, or breaks the protocol, is let go of for good. Its requests are answered
with errors from then on, and so is all that the guest asks for after that, until another one runs
in its place (`restart`).
"""

from __future__ import annotations

import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

from vmm.core.errors import GuestMemoryError, PyvmmError, in_words, tell
from vmm.core.event_loop import drain
from vmm.core.lean_typing import Any, NamedTuple
from vmm.core.saved import NotSaved, State
from vmm.devices.vhost_user import messages
from vmm.devices.vhost_user.channel import BackEndError, Channel
from vmm.devices.vhost_user.rings import ForeignQueue
from vmm.devices.virtio.device import GuestMemory, VirtioDevice
from vmm.devices.virtio.queue import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    Chain,
    QueueError,
    SplitQueue,
)

VERSION_1 = 1 << 32
RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX
MOST_QUEUES = 16
PAGE_STATES = "not enforced: it may touch all of the shared side; unshared pages are punched there"
"""What the report says of the pages that a back end can reach."""


class Wires(NamedTuple):
    """What connects the device to the machine."""

    memory: int
    """The file of guest memory's shared side."""
    regions: Sequence[messages.Region]
    """What of it the back end is told to map."""
    kicks: Sequence[int]
    """An eventfd for each queue: the guest has notified."""
    calls: Sequence[int]
    """An eventfd for each queue: the guest is to be interrupted."""
    connect: Callable[[], None]
    """The back end's calls may reach the guest by themselves from now on."""
    disconnect: Callable[[], None]
    """They are the device's own business again."""


class BackEnd(NamedTuple):
    """A connection to a back end, and what it has said of itself."""

    channel: Channel
    features: int
    protocol_features: int
    queues: int
    """How many it serves at most; 0 where it doesn't say."""


def greet(channel: Channel, wanted: int, needed: int) -> BackEnd:
    """What both sides have to know of each other before there is a guest.

    `wanted` and `needed` are protocol features. Raises BackEndError.
    """
    channel.begin()
    features = channel.number(messages.GET_FEATURES)
    if not features & VERSION_1:
        raise BackEndError(f"its features {features:#x} are those of legacy virtio")
    agreed = 0
    if features & messages.F_PROTOCOL_FEATURES:
        agreed = channel.number(messages.GET_PROTOCOL_FEATURES) & (wanted | needed)
    if agreed & needed != needed:
        raise BackEndError(f"it lacks the protocol features {needed & ~agreed:#x}")
    if features & messages.F_PROTOCOL_FEATURES:
        channel.send(messages.SET_PROTOCOL_FEATURES, messages.U64.pack(agreed))
    channel.send(messages.SET_OWNER)
    queues = 0
    if agreed & messages.PROTOCOL_F_MQ:
        queues = channel.number(messages.GET_QUEUE_NUM)
    return BackEnd(channel, features, agreed, queues)


class VhostUserDevice(VirtioDevice):
    """What all such devices share; one class of each kind says what it is to the guest."""

    served_elsewhere = True
    queue_type = ForeignQueue
    wanted_protocol_features = messages.PROTOCOL_F_MQ
    needed_protocol_features = 0
    passed_features = 0
    """Features of the device that the guest may have where the back end has them."""

    def __init__(self, name: str, path: str, connect: Callable[[], socket.socket]) -> None:
        """`name` is the device's in the report; `connect` makes a connection to the socket at
        `path` (OSError). Raises BackEndError."""
        super().__init__()
        self.name = name
        self.path = path
        self.reconnect = connect
        """Makes another connection later on; may be replaced by what works in a sandbox."""
        self._wires: Wires | None = None
        self._is_known = False
        first = self._greeted(connect)
        self._is_known = True
        self.features = first.features & self.passed_features
        self.lacks = RING_FEATURES & ~first.features
        self._back_end: BackEnd | None = first
        self._next: BackEnd | None = None  # a back end that came after, not at work yet
        self._restarting = False
        # For the connection: a vCPU's thread sets queues up, the loop hears of its end. Who holds
        # it never waits for the transport.
        self._talking = threading.RLock()
        self._taken_over: set[int] = set()
        self._opened = time.monotonic()
        self._passed_at: float | None = None
        self._lost = 0
        self._restarts = 0
        self._told = False

    # --- what a kind of device says ---

    @abstractmethod
    def accept(self, back_end: BackEnd) -> None:
        """Take from the back end what the guest is to see; may ask it. Raises BackEndError where it
        can't be used, or (after a restart) isn't what the guest knows."""

    @abstractmethod
    def refuse(self, chain: Chain) -> int:
        """Answer a request with an error; how many bytes that wrote."""

    def state(self) -> State:
        """Raises NotSaved: what the back end knows stays there."""
        raise NotSaved(
            f"{self.name} is served by another program and can't be saved; run the machine with a "
            "device of pyvmm's own in its place"
        )

    # --- set-up ---

    def _greeted(self, connect: Callable[[], socket.socket]) -> BackEnd:
        try:
            channel = Channel(connect())
        except OSError as error:
            raise BackEndError(str(error.strerror or error)) from error
        try:
            found = greet(channel, self.wanted_protocol_features, self.needed_protocol_features)
            if self._is_known:
                self._require_what_was_offered(found.features)
            self.accept(found)
        except BaseException:
            channel.close()
            raise
        return found

    def _require_what_was_offered(self, features: int) -> None:
        """A back end that comes later has to do what the guest was told."""
        offered = self.features | RING_FEATURES & ~self.lacks
        lacking = offered & ~features
        if lacking:
            raise BackEndError(f"it lacks the features {lacking:#x}, which the guest was offered")

    def wire(self, wires: Wires) -> None:
        """The machine is there; before the device is used."""
        self._wires = wires

    def start(self) -> None:
        self._listen()

    # --- the transport's side ---

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        """The driver is up. Raises GuestMemoryError for rings that aren't in shared memory."""
        for queue in queues.values():
            assert isinstance(queue, ForeignQueue)
            queue.require_shared(memory)
        super().activate(memory, queues, features)
        with self._talking:
            self._taken_over = set()
            if self._next is not None:
                self._replace()
            try:
                self._hand_over()
            except BackEndError as error:
                self._lose(str(error))
        self._watch_queues()

    def reset(self) -> None:
        """The driver is gone: have the back end let go of its rings."""
        was_active = bool(self._queues)
        with self._talking:
            if was_active:
                self._unwatch_queues()
            try:
                if was_active:
                    self._take_back()
            except BackEndError as error:
                self._lose(str(error))
            super().reset()

    def process(self, queue_index: int) -> bool:
        """Without a back end, answer with errors; with one, the queue is its business."""
        if self._next is not None:
            self._resume()
        if self._back_end is not None:
            return False
        assert self._wires is not None
        drain(self._wires.kicks[queue_index])
        wanted = self._take_over(queue_index)
        return self.answer_all(self._queues[queue_index], self._refused) or wanted

    def _take_over(self, index: int) -> bool:
        """Answer what the back end has left, once; True when the driver wants an interrupt."""
        if index in self._taken_over:
            return False
        queue = self._queues[index]
        assert isinstance(queue, ForeignQueue)
        try:
            left = queue.take_over()
        except (QueueError, GuestMemoryError) as error:
            if not self._told:  # the guest may make it happen as often as it likes
                tell(f"{self.name} serves no request until its driver resets it: {error}")
            self._told = True
            raise
        self._taken_over.add(index)
        return queue.publish([(chain.head, self._refused(chain)) for chain in left])

    def called(self, index: int) -> None:
        """On the loop's thread: the back end wants the driver interrupted. No lock of the queue's,
        which a vCPU may hold while it waits for the back end."""
        assert self._wires is not None
        drain(self._wires.calls[index])
        self.interrupt(index)

    def _refused(self, chain: Chain) -> int:
        self.statistics.add("errors", 1)
        return self.refuse(chain)

    # --- what the connection brings ---

    def _listen(self) -> None:
        """Hear of the back end's end; not while a conversation is under way."""
        if self._back_end is not None:
            self.watch(self._back_end.channel.fd, self._heard, readable=True)

    def _heard(self) -> None:
        """On the loop's thread: the back end says what nobody asked for, or is gone."""
        if not self._talking.acquire(blocking=False):
            return  # a conversation: what comes is its answer
        try:
            if self._back_end is None or self._back_end.channel.is_silent():
                return
            self._lose("it has ended or closed the connection, or sent what nobody asked for")
            queues = list(self._queues)
        finally:
            self._talking.release()
        self._watch_queues()
        for index in queues:
            self.serve(index)

    def _lose(self, why: str) -> None:
        """Let go of the back end; requests are answered with errors from now on."""
        if self._back_end is None:
            return
        assert self._wires is not None
        self._unwatch_queues()
        self._wires.disconnect()
        self.watch(self._back_end.channel.fd, self._heard)
        self._back_end.channel.close()
        self._back_end = None
        self._told = False
        self._lost += 1
        tell(
            f"{self.name} has lost its back end at {self.path}: {why}; the guest's requests fail "
            f"until another runs there and: pyvmm ctl PATH device restart {self.name}"
        )

    def _watch_queues(self) -> None:
        """Calls of a back end that don't reach the guest by themselves; without one, what the guest
        notifies."""
        assert self._wires is not None
        fds = self._wires.calls if self._back_end is not None else self._wires.kicks
        for index in self._queues:
            served = _served(self, index) if self._back_end is None else _called(self, index)
            self.watch(fds[index], served, readable=True)

    def _unwatch_queues(self) -> None:
        assert self._wires is not None
        for index in self._queues:
            self.watch(self._wires.calls[index], _nothing)
            self.watch(self._wires.kicks[index], _nothing)

    # --- what is said to the back end, with `_talking` held ---

    def _hand_over(self) -> None:
        """Memory, then the queues. Raises BackEndError."""
        back_end, wires = self._back_end, self._wires
        if back_end is None or wires is None:
            return
        channel = back_end.channel
        channel.begin()
        has_protocol = back_end.features & messages.F_PROTOCOL_FEATURES
        # ACCESS_PLATFORM would make the addresses on the rings an IOMMU's, which the back end would
        # have to ask for one by one; they are guest-physical.
        agreed = self._agreed & back_end.features | VERSION_1 | has_protocol
        channel.send(messages.SET_FEATURES, messages.U64.pack(agreed))
        table, fds = messages.memory_table(wires.regions), [wires.memory] * len(wires.regions)
        channel.send(messages.SET_MEM_TABLE, table, fds)
        if self._passed_at is None:
            self._passed_at = time.monotonic()
        for index, queue in self._queues.items():
            assert isinstance(queue, ForeignQueue)
            desc, avail, used = (user_address(wires.regions, gpa) for gpa in queue.addresses)
            state = messages.vring_state
            channel.send(messages.SET_VRING_NUM, state(index, queue.size))
            channel.send(messages.SET_VRING_BASE, state(index, queue.next_available))
            addresses = messages.vring_addresses(index, desc, used, avail)
            channel.send(messages.SET_VRING_ADDR, addresses)
            number = messages.U64.pack(index)
            channel.send(messages.SET_VRING_CALL, number, [wires.calls[index]])
            channel.send(messages.SET_VRING_KICK, number, [wires.kicks[index]])
            if has_protocol:
                channel.send(messages.SET_VRING_ENABLE, state(index, 1))
        wires.connect()

    def _take_back(self) -> None:
        """The queues are the driver's again. Raises BackEndError."""
        back_end, wires = self._back_end, self._wires
        if back_end is None or wires is None:
            return
        wires.disconnect()
        channel = back_end.channel
        channel.begin()
        for index in self._queues:
            if back_end.features & messages.F_PROTOCOL_FEATURES:
                channel.send(messages.SET_VRING_ENABLE, messages.vring_state(index, 0))
            # Answered when the back end has done with the ring.
            size = messages.STATE.size
            channel.ask(messages.GET_VRING_BASE, messages.vring_state(index, 0), size=size)
        for index in self._queues:
            drain(wires.calls[index])
            drain(wires.kicks[index])

    # --- another back end ---

    def restart(self) -> None:
        """Another back end runs at the socket now: have it serve the guest. Returns at once; the
        user is told what came of it. Raises PyvmmError where there is nothing to restart."""
        with self._talking:
            if self._back_end is not None:
                raise PyvmmError(f"{self.name}: its back end at {self.path} is connected")
            if self._restarting:
                raise PyvmmError(f"{self.name}: a restart is under way")
            self._restarting = True
        # The back end may not answer: that is waited for by nobody else.
        threading.Thread(target=self._restart, name="vhost-user restart", daemon=True).start()

    def _restart(self) -> None:
        from vmm.core.thread_signals import leave_signals_to_the_main_thread

        leave_signals_to_the_main_thread()
        try:
            found = self._greeted(self.reconnect)
        except (OSError, PyvmmError) as error:
            why = in_words(error) if isinstance(error, OSError) else error
            tell(f"{self.name}: no back end to take over at {self.path}: {why}")
            self._restarting = False
            return
        with self._talking:
            self._restarting = False
            self._next = found
            if not self._queues:
                self._replace()
                return
            index = next(iter(self._queues))
        self.wake(index)

    def _replace(self) -> None:
        """The back end that waits is the device's."""
        self._back_end, self._next = self._next, None
        self._restarts += 1
        self._listen()
        tell(f"{self.name}: another back end has taken over at {self.path}")

    def _resume(self) -> None:
        """In the middle of a driver's life: answer what is left, then begin where the guest is."""
        for index in self._queues:
            if self._take_over(index):
                self.interrupt(index)
        with self._talking:
            if self._next is None:
                return
            self._unwatch_queues()
            self._replace()
            self._taken_over = set()
            try:
                self._hand_over()
            except BackEndError as error:
                self._lose(str(error))
        self._watch_queues()
        for index in self._queues:  # a notify from before
            self.wake(index)

    # --- the end, and the report ---

    def disconnect(self) -> None:
        if self._back_end is not None:
            self.watch(self._back_end.channel.fd, self._heard)
        super().disconnect()

    def close(self) -> None:
        for back_end in (self._back_end, self._next):
            if back_end is not None:
                back_end.channel.close()
        self._back_end = self._next = None

    def as_dict(self) -> dict[str, Any]:
        """For the report: what the back end was given, since when (seconds of the run), and how
        often it was lost."""
        wires = self._wires
        regions = [] if wires is None or self._passed_at is None else wires.regions
        since = None if self._passed_at is None else round(self._passed_at - self._opened, 3)
        return {
            "socket": self.path,
            "memory_bytes": sum(each.size for each in regions),
            "regions": [[each.offset, each.size] for each in regions],
            "since_s": since,
            "page_states": PAGE_STATES,
            "connected": self._back_end is not None,
            "lost": self._lost,
            "restarts": self._restarts,
        }


def user_address(regions: Sequence[messages.Region], gpa: int) -> int:
    """What the back end is told for a guest address. Raises QueueError where it has none."""
    for each in regions:
        if each.guest_address <= gpa < each.guest_address + each.size:
            return gpa - each.guest_address + each.user_address
    raise QueueError(f"a ring at {gpa:#x} is in no memory that a back end may map")


def _nothing() -> None:
    """For what is no longer watched."""


def _served(device: VhostUserDevice, index: int) -> Callable[[], None]:
    return lambda: device.serve(index)


def _called(device: VhostUserDevice, index: int) -> Callable[[], None]:
    return lambda: device.called(index)
