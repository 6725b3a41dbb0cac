"""A device's process: the device as it is, on memory that pyvmm reads and writes for it.

It does what a transport does in pyvmm's own process: turns with a budget, a device that stops when
its rings or its memory are not as they should be. It ends when pyvmm lets go of the socket.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial

from vmm.core.errors import GuestMemoryError, one_line
from vmm.core.event_loop import Postponed
from vmm.devices.process import protocol
from vmm.devices.process.protocol import HEAD
from vmm.devices.process.remote_memory import (
    Channel,
    PyvmmIsGone,
    Redo,
    RemoteBatches,
    RemoteMemory,
    RemoteQueue,
    StaleAccess,
)
from vmm.devices.virtio.device import EXPECTED, VirtioDevice
from vmm.devices.virtio.pci_transport import LOOKS_AT_ONCE
from vmm.devices.virtio.queue import SplitQueue


class BackEnd:
    """Serves one device on one socket."""

    def __init__(
        self,
        device: VirtioDevice,
        connection: socket.socket,
        files: Sequence[int],
        may_keep: Callable[[int], bool] = lambda features: False,
    ) -> None:
        """`files`: the fds that bytes are moved from and to, as pyvmm numbers them. `may_keep`:
        whether, with these features agreed on, moves may be carried out as late as what tells the
        driver of them."""
        self._device = device
        self._channel = Channel(connection)
        self._may_keep = may_keep
        self._memory: RemoteMemory | None = None
        self._numbers = {fd: number for number, fd in enumerate(files)}
        self._queues: dict[int, SplitQueue] = {}
        self._kicked: set[int] = set()
        # Those to be served, in their order; values are what a notify brought along, and what its
        # flags say of that.
        self._ready: dict[int, tuple[bytes, int] | None] = {}
        # Those whose last turn left something: what it brought along is still new.
        self._going_on: set[int] = set()
        self._poll = select.poll()
        self._poll.register(self._channel.fileno(), select.POLLIN)
        self._watched: dict[int, Callable[[], None]] = {}
        self._postponed = Postponed()
        device.watch = self._watch
        device.wake = lambda queue: self._ready.setdefault(queue, None)  # type: ignore[assignment]
        device.serve = self._serve
        device.announce = self._announce
        device.keep_for_next = self._keep
        device.tell_user = self._note

    def run(self, confined: int, landlock: int) -> None:
        """Until pyvmm is gone. `confined`, `landlock`: what it is to be told of the sandbox."""
        try:
            self._channel.say(protocol.DONE, confined, landlock)
            self._device.start()
            while True:
                self._round()
        except PyvmmIsGone:
            pass

    def _round(self) -> None:
        channel = self._channel
        if channel.backlog:
            self._obey(memoryview(channel.backlog.pop(0)))
        elif not (self._ready or self._watched or self._postponed.first()):
            self._obey(channel.hear())
        else:
            for fd, _ in self._poll.poll(self._patience()):
                if fd == channel.fileno():
                    self._obey(channel.hear())
                elif fd in self._watched:
                    self._guarded(self._watched[fd])
            self._postponed.begin_due()
        if self._ready and not channel.backlog:
            queue = next(iter(self._ready))
            self._turn(queue, self._ready.pop(queue))

    def _patience(self) -> float | None:
        """For how many milliseconds there is nothing to do, if nothing happens; None: ever."""
        if self._ready:
            return 0
        first = self._postponed.first()
        return None if first is None else max(first - time.monotonic(), 0.0) * 1000

    def _obey(self, packet: memoryview) -> None:
        what, flags, queue, generation = HEAD.unpack_from(packet)
        body = packet[HEAD.size :]
        if what == protocol.KICK:
            if generation == self._channel.generation and queue in self._queues:
                self._kicked.add(queue)
                self._ready[queue] = (bytes(body), flags) if body else None
                self._going_on.discard(queue)
            return
        if what not in (protocol.ACTIVATE, protocol.RESET):
            return  # the answer to what was asked before a reset
        self._tell(0, 0)  # a driver that was interrupted may be here before the turn's end
        self._forget()
        self._channel.generation = generation
        self._channel.say(protocol.DONE)
        if what == protocol.ACTIVATE:
            self._guarded(lambda: self._activate(flags, bytes(body)))

    def _activate(self, flags: int, body: bytes) -> None:
        features, kept = protocol.FEATURES.unpack_from(body)
        memory: RemoteMemory
        if flags & protocol.BATCHES:
            memory = RemoteBatches(
                self._channel,
                self._numbers,
                may_keep=self._may_keep(features),
                may_guess=bool(flags & protocol.QUIET),
                counts=self._counts,
                kicked=self._kicked,
            )
        else:
            memory = RemoteMemory(self._channel, self._numbers)
        self._memory = memory
        for index, base, size, desc, avail, used in protocol.QUEUE.iter_unpack(
            body[protocol.FEATURES.size :]
        ):
            queue: SplitQueue
            if isinstance(memory, RemoteBatches):
                queue = RemoteQueue(memory, index, size, desc, avail, used, features)
            else:
                queue = SplitQueue(memory, size, desc, avail, used, features)
            if flags & protocol.RESUMED:
                queue.resume(base)
            self._queues[index] = queue
        self._device.activate(memory, self._queues, features)
        if flags & protocol.RESUMED:
            self._device.resumed(kept)

    def _forget(self) -> None:
        self._queues = {}
        self._kicked.clear()
        self._ready.clear()
        self._going_on.clear()
        self._device.reset()

    def _serve(self, queue: int) -> None:
        if queue in self._queues:
            self._turn(queue, self._ready.pop(queue, None))

    def _turn(self, index: int, brought: tuple[bytes, int] | None) -> None:
        """Serve a queue, as far as a turn's budget goes."""
        queue = self._queues.get(index)
        if queue is None:
            return
        self._guarded(lambda: self._serve_queue(index, queue, brought))
        if self._device.config_is_news:
            self._device.config_is_news = False
            self._announce()

    def _serve_queue(
        self, index: int, queue: SplitQueue, brought: tuple[bytes, int] | None
    ) -> None:
        device, memory = self._device, self._memory
        queue.budget.begin()
        counts = dict(vars(device.statistics))
        try:
            if isinstance(queue, RemoteQueue) and isinstance(memory, RemoteBatches):
                memory.begin()
                if index in self._going_on:
                    self._going_on.discard(index)
                else:
                    queue.begin(*(brought or (None, 0)))
            interrupt = self._look(index, queue)
            if isinstance(memory, RemoteBatches):
                memory.end()
        except Redo:
            assert isinstance(queue, RemoteQueue)
            queue.rewind()
            vars(device.statistics).update(counts)
            self._ready.setdefault(index, None)
            return
        flags = protocol.INTERRUPT if interrupt else 0
        if queue.more:
            self._ready.setdefault(index, None)
            self._going_on.add(index)
        elif index in self._kicked:
            self._kicked.discard(index)
            flags |= protocol.RESTED
        if flags:
            self._tell(index, flags)

    def _look(self, index: int, queue: SplitQueue) -> bool:
        """Whether the driver wants an interrupt for what was returned last."""
        interrupt = False
        for _ in range(LOOKS_AT_ONCE):
            if interrupt:
                self._tell(index, protocol.INTERRUPT)
            queue.more = queue.soon = False
            interrupt = self._device.process(index)
            if not (queue.soon and queue.budget.look()):
                break
        return interrupt

    def _tell(self, index: int, flags: int) -> None:
        self._channel.say(protocol.TURN, flags, index, self._counts())

    def _counts(self) -> bytes:
        counts = self._device.statistics
        return protocol.COUNTS.pack(
            counts.requests, counts.flushes, counts.errors, counts.bytes_read, counts.bytes_written
        )

    def _guarded(self, work: Callable[[], None]) -> None:
        """Whatever a device's work may raise stops the device, until it is reset."""
        try:
            work()
        except (PyvmmIsGone, StaleAccess) as error:
            if isinstance(error, PyvmmIsGone):
                raise
        except Exception as error:
            refused = isinstance(error, GuestMemoryError)
            text = str(error) if isinstance(error, EXPECTED) else repr(error)
            words = one_line(text).encode()[: protocol.MOST_TEXT]
            self._forget()
            self._channel.say(protocol.STOPPED, protocol.REFUSED if refused else 0, 0, words)

    def _keep(self, number: int) -> None:
        self._channel.say(protocol.KEEP, 0, 0, protocol.KEPT.pack(number))

    def _note(self, sentence: str) -> None:
        words = one_line(sentence).encode()[: protocol.MOST_TEXT]
        self._channel.say(protocol.NOTE, 0, 0, words)

    def _announce(self) -> None:
        self._channel.say(protocol.CONFIG, 0, 0, self._device.config())

    def _watch(
        self,
        fd: int,
        callback: Callable[[], None],
        *,
        readable: bool = False,
        writable: bool = False,
        after: float = 0.0,
    ) -> None:
        self._postponed.drop(fd)
        if after or not (readable or writable):
            if self._watched.pop(fd, None) is not None:
                self._poll.unregister(fd)
            if after:
                begin = partial(self._watch, fd, callback, readable=readable, writable=writable)
                self._postponed.put(fd, after, begin)
            return
        self._watched[fd] = callback
        self._poll.register(fd, readable * select.POLLIN | writable * select.POLLOUT)
