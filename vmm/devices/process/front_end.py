"""What stands for a device that runs in a process of its own: pyvmm's side.

It carries out the accesses to guest memory that the process asks for, raises its interrupts, and
tells it of notifies and resets. The process may have been taken over by the guest: nothing that it
says is believed, its silence is bounded, and it never has an access carried out that the device in
pyvmm's own process wouldn't have.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from kvm_bindings.virtqueue import MOST_ENTRIES
from vmm.core.errors import (
    AccessDenied,
    GuestMemoryError,
    PrivateAccess,
    PyvmmError,
    one_line,
    tell,
)
from vmm.core.lean_typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from vmm.devices.process import protocol
from vmm.devices.process.protocol import HEAD, ProtocolError
from vmm.devices.virtio.device import (
    GuestMemory,
    IoStatistics,
    VirtioDevice,
    _unconnected,
)
from vmm.devices.virtio.queue import (
    AVAIL_NO_INTERRUPT,
    F_EVENT_IDX,
    Chain,
    QueueError,
    SplitQueue,
)
from vmm.devices.virtio.segments import scatter

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

ANSWER_SECONDS = 30.0
"""How long a process may say nothing while something is for it to do: as long as Linux waits for a
SCSI disk's command. Its longest step is a flush."""
_MOST_LOOKED_INTO = 8
"""Queues of a device whose rings are sent along with a notify: all of them fit into the socket."""
_S_IOERR = b"\x01"
_STATUS_OF = {AccessDenied: protocol.DENIED, PrivateAccess: protocol.PRIVATE}
_OF_THE_PROCESS = ("pid", "deaths", "restarts", "last_end", "seccomp", "landlock")
_ASKED = (protocol.READ, protocol.WRITE, protocol.RETURN, protocol.MOVE_IN, protocol.MOVE_OUT)


class MovedFile(NamedTuple):
    """A file that bytes are moved from and to for the process."""

    fd: int
    size: int
    read_only: bool


class Processes(Protocol):
    """What starts and ends the process: `vmm.devices.process.spawner`."""

    def start(self, number: int) -> tuple[socket.socket, int]:
        """The socket to a new process, and its id. Raises HostError."""
        ...

    def end(self, number: int) -> str:
        """End the process, if it hasn't; how it ended, in words."""
        ...


class _Short(Exception):
    """So many bytes were moved, and fewer than asked for: what depends on them isn't done."""

    def __init__(self, moved: int) -> None:
        super().__init__()
        self.moved = moved


class ProcessStatistics(IoStatistics):
    """Those of every device, and what became of its processes. Bytes from and to files are counted
    here; the rest is what the process says."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = 0
        self.deaths = 0
        self.restarts = 0
        self.seccomp = False
        self.landlock = 0
        self.last_end: str | None = None

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = dict(vars(self))
        found["process"] = {name: found.pop(name) for name in _OF_THE_PROCESS}
        return found


class ProcessDevice(VirtioDevice):
    """A device that runs elsewhere. On the loop's thread, but for what the driver's accesses to
    registers bring about (`activate`, `reset`), which come on a vCPU's."""

    apart = True

    def __init__(
        self,
        device: VirtioDevice,
        name: str,
        number: int,
        processes: Processes,
        files: Sequence[MovedFile] = (),
        *,
        fails_requests: bool = False,
        config_without: bytes | None = None,
        events_without: Sequence[tuple[int, bytes]] = (),
        drops_without: Mapping[int, int] | None = None,
        restarts: bool = True,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        """`device` is the one that runs in process `number` of `processes`, and stays untouched
        here; `restarts`: whether another process can take its place.

        Without its process, requests end with a disk's I/O error (`fails_requests`), or the driver
        finds its configuration to be `config_without`, or gets events, a queue and its bytes each
        (`events_without`), and what it says on some queues is answered and dropped
        (`drops_without`: by queue, which bits are set then of the number that the next process
        gets). These are for devices that answer in order: a new process goes on behind what was
        answered last. Else the driver has to reset the device.
        """
        super().__init__()
        self.statistics: ProcessStatistics = ProcessStatistics()
        self.device_id, self.pci_class = device.device_id, device.pci_class
        self.features, self.queue_sizes = device.features, device.queue_sizes
        self.engine, self.may_decline = device.engine, device.may_decline
        self.lacks = device.lacks
        self.set_timer: Callable[[float, Callable[[], None]], None] = _unconnected
        self._own_config = self._config_with = device.config()
        self._config_without = config_without
        self._events_without = events_without
        self._drops_without = drops_without or {}
        self._restarts = restarts
        self._goes_on = (
            fails_requests or config_without is not None or bool(events_without or drops_without)
        )
        self._close_device = device.close
        self._name = name
        self._number = number
        self._processes = processes
        self._files = files
        self._fails_requests = fails_requests
        self._answer_seconds = answer_seconds
        # A reset on a vCPU's thread waits for the access that is under way, and none follows.
        self._lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._buffer = memoryview(bytearray(protocol.LONGEST + 1))
        self._generation = 0
        self._before = (0, 0, 0, 0, 0)  # what earlier processes have counted
        self._begin_anew()
        self._delivering = self._has_news = False
        self._owed: list[tuple[int, bytes]] = []  # events that wait for buffers
        self._kept = self._notes = 0
        self._interrupted: int | None = None  # by the message that is being carried out
        self._refusal: GuestMemoryError | None = None

    def _begin_anew(self) -> None:
        """Nothing has been said to the process, nor by it."""
        self._is_new = self._awaits_done = True  # it says so when it has started
        self._is_behind = False  # the last activation or reset was not said yet
        self._bases: dict[int, int] | None = None
        self._kicked: set[int] = set()
        self._again: set[int] = set()
        # By queue, what a RETURN with a number had read afterwards: its number, its pieces.
        self._read_after: dict[int, tuple[int, list[int]]] = {}
        self._interrupts: set[int] = set()
        self._failure: Exception | None = None
        self._heard = True
        self._is_timed = False

    # --- the transport's and the machine's side ---

    def config(self) -> bytes:
        return self._own_config

    def start(self) -> None:
        """Raises HostError."""
        with self._lock:
            self._connect()

    def activate(
        self, memory: GuestMemory, queues: Mapping[int, SplitQueue], features: int
    ) -> None:
        with self._lock:
            super().activate(memory, queues, features)
            if self._socket is None and not self._goes_on:
                raise QueueError(f"{self._name}: its process has ended")
            self._next_generation()

    def reset(self) -> None:
        with self._lock:
            super().reset()
            self._next_generation()

    def process(self, queue_index: int) -> bool:
        with self._lock:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if self._memory is None:
                return False
            if self._socket is None:
                if self._fails_requests:
                    return self.answer_all(self._queues[queue_index], self._fail)
                if queue_index in self._drops_without:
                    return self.answer_all(
                        self._queues[queue_index], lambda chain: self._drop(queue_index)
                    )
                return self._tell_events(queue_index)  # the rest is for the process to come
            if not self._delivering:
                self._kick(queue_index)
            interrupt = queue_index in self._interrupts
            self._interrupts.discard(queue_index)
            return interrupt

    def state(self) -> State:
        """Raises NotSaved: where its queues are the process knows."""
        from vmm.core.saved import NotSaved

        raise NotSaved(
            f"{self._name} is in a process of its own and can't be saved; run the machine without "
            "the setting process"
        )

    def restore(self, saved: Saved) -> None:
        """Raises BadState: its process would take up the rings from their start."""
        raise saved.bad(
            f"{self._name} is to be in a process of its own and can't be restored there; leave the "
            "setting process away"
        )

    def hear_out(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._socket is not None:
            # Without anything under way, what has been said already. What it did before a reset it
            # tells before it is done with that.
            under_way = self._kicked or self._awaits_done
            left = max(deadline - time.monotonic(), 0) if under_way else 0
            if not select.select([self._socket], [], [], left)[0]:
                return
            self._ready()

    def disconnect(self) -> None:
        with self._lock:
            self._let_go()
        super().disconnect()

    def close(self) -> None:
        self._processes.end(self._number)
        self._close_device()

    def restart(self) -> None:
        """A new process, which goes on behind what the last one had answered, where the device is
        one for that. On the loop's thread, while the machine isn't paused. Raises LookupError where
        it can't be, HostError."""
        if not self._restarts:
            raise LookupError(
                f"{self._name} has a connection that no other process can take up; start the "
                "machine again"
            )
        with self._lock:
            was_there = self._socket is not None
            self._let_go()
            self._processes.end(self._number)
            counts = self.statistics
            counts.restarts += 1
            self._before = (
                counts.requests, counts.flushes, counts.errors,
                counts.bytes_read, counts.bytes_written,
            )  # fmt: skip
            self._begin_anew()
            self._generation = (self._generation + 1) & 0xFFFF_FFFF
            self._owed = []  # it tells of itself
            if self._memory is not None:
                self._is_behind = True
                if not self._goes_on and was_there:
                    self._failure = QueueError(f"{self._name}: its process was started anew")
                elif self._goes_on:
                    self._resume()
            self._connect()
            if self._own_config != self._config_with:
                self._own_config, self._has_news = self._config_with, True
        self._deliver(self._queues if self._failure is not None else ())
        self._tell_news()

    # --- towards the process; the lock is held ---

    def _connect(self) -> None:
        connection, pid = self._processes.start(self._number)
        connection.setblocking(False)
        self._socket = connection
        self.statistics.pid = pid
        self.watch(connection.fileno(), self._ready, readable=True)
        self._expect()

    def _let_go(self) -> None:
        if self._socket is not None:
            self.watch(self._socket.fileno(), self._ready)
            self._socket.close()
            self._socket = None

    def _next_generation(self) -> None:
        self._generation = (self._generation + 1) & 0xFFFF_FFFF
        self._kicked.clear()
        self._again.clear()
        self._read_after.clear()
        self._interrupts.clear()
        self._failure = self._refusal = self._bases = None
        self._owed = []
        self._kept = 0
        self._is_behind = True
        self._catch_up()

    def _catch_up(self) -> None:
        """Say the last activation or reset, unless an answer to the one before is still to come:
        a guest that resets without end doesn't fill the socket."""
        if self._socket is None or self._awaits_done or not self._is_behind:
            return
        self._is_behind, self._awaits_done = False, True
        memory, bases = self._memory, self._bases
        if memory is None:
            self._say(protocol.RESET)
            return
        flags = protocol.BATCHES if hasattr(memory, "read_many") else 0
        flags |= protocol.QUIET if getattr(memory, "quiet", False) else 0
        flags |= protocol.RESUMED if bases is not None else 0
        body = protocol.FEATURES.pack(self._agreed, self._kept)
        for index, queue in self._queues.items():
            base = 0 if bases is None else bases[index]
            body += protocol.QUEUE.pack(index, base, queue.size, *queue.addresses)
        self._say(protocol.ACTIVATE, flags, 0, body)
        waiting = list(self._again if bases is None else self._queues)
        self._again.clear()
        for index in waiting:
            self._kick(index)

    def _kick(self, queue: int) -> None:
        """Have a queue served."""
        if self._is_behind:
            self._again.add(queue)  # when the process knows of it
            return
        if queue in self._kicked:
            self._again.add(queue)
            return
        self._kicked.add(queue)
        number, rings = self._rings(queue)
        self._say(protocol.KICK, number, queue, rings)

    def _rings(self, index: int) -> tuple[int, bytes | bytearray]:
        """What is in a queue's rings, to spare the process the question; or what it had read after
        its last RETURN, by that one's number."""
        queue = self._queues[index]
        read_many = getattr(self._memory, "read_many", None)
        if read_many is None or queue.size > MOST_ENTRIES or len(self._queues) > _MOST_LOOKED_INTO:
            return 0, b""
        desc, avail, _ = queue.addresses
        known = [(0, protocol.ring_pieces(queue.size, desc, avail))]
        if index in self._read_after:
            known.insert(0, self._read_after.pop(index))
        for number, pieces in known:
            with contextlib.suppress(GuestMemoryError, OSError):
                return number, read_many(pieces)
        return 0, b""  # it finds out by itself

    def _say(
        self, what: int, flags: int = 0, queue: int = 0, body: bytes | bytearray = b""
    ) -> None:
        assert self._socket is not None
        self._expect()
        try:
            self._socket.send(HEAD.pack(what, flags, queue, self._generation) + body)
        except OSError:
            # It has ended, or takes no messages, of which there are never many. Seen to on the
            # loop's thread, where the socket reads as ended now.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    # --- how long it may be silent ---

    def _expect(self) -> None:
        """Something is for the process to do."""
        if not self._is_timed:
            self._is_timed, self._heard = True, False
            self.set_timer(time.monotonic() + self._answer_seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        ends = False
        with self._lock:
            if self._socket is None:
                return
            self._is_timed = False
            if not (self._awaits_done or self._kicked):
                return
            # What it says while the guest stands still waits to be read.
            waits = bool(select.select([self._socket], [], [], 0)[0])
            if self._heard or waits:
                self._expect()
            else:
                ends = True
        if ends:
            self._lost(f"said nothing for {self._answer_seconds:g} s")

    # --- from the process ---

    def _ready(self) -> None:
        """One message, however many there are: others on the loop have their turn in between."""
        queue = lost = None
        with self._lock:
            if self._socket is None:
                return
            try:
                size = self._socket.recv_into(self._buffer)
                self._heard = True
                if size:
                    queue = self._obey(size)
                else:
                    lost = ""
            except BlockingIOError:
                return
            except OSError:
                lost = ""
            except ProtocolError as error:
                lost = f"broke the protocol: {error}"
            except PyvmmError:
                raise  # a policy's word on the run as a whole
            except Exception as error:  # a mistake here costs the guest that device, not the run
                lost = f"had pyvmm fail: {error!r}"
        if lost is not None:
            self._lost(lost)
        elif queue is not None:
            self._deliver((queue,))
        self._tell_news()

    def _tell_news(self) -> None:
        """The configuration may have become another one. Without the lock."""
        if self._has_news:
            self._has_news = False
            self.announce()

    def _obey(self, size: int) -> int | None:
        """Carry out one message; a queue about which the transport is to be told."""
        if not HEAD.size <= size <= protocol.LONGEST:
            raise ProtocolError(f"a message of {size} bytes")
        what, flags, queue, generation = HEAD.unpack_from(self._buffer)
        body = self._buffer[HEAD.size : size]
        if what in _ASKED:
            return self._answer(what, flags, queue, generation, body)
        if what == protocol.DONE:
            self._done(flags, queue)
            return None
        if what == protocol.TURN:
            if len(body) != protocol.COUNTS.size:
                raise ProtocolError(f"a turn of queue {queue}")
            self._count(_counts_in(body))  # true also of a turn from before a reset
        if generation != self._generation or self._memory is None:
            return None  # of before a reset
        if what == protocol.TURN:
            return self._turn(flags, queue)
        if what == protocol.STOPPED:
            return self._stopped(flags, body)
        if what == protocol.NOTE:
            self._note(body)
            return None
        if what == protocol.KEEP:
            if len(body) != protocol.KEPT.size:
                raise ProtocolError(f"{len(body)} bytes to keep")
            (self._kept,) = protocol.KEPT.unpack(body)
            return None
        if what == protocol.CONFIG:
            self._reconfigure(bytes(body))
            return None
        raise ProtocolError(f"message {what}")

    def _done(self, flags: int, landlock: int) -> None:
        if not self._awaits_done:
            raise ProtocolError("done with nothing")
        self._awaits_done = False
        if self._is_new:
            self._is_new = False
            self.statistics.seccomp, self.statistics.landlock = bool(flags), landlock
        self._catch_up()

    def _count(self, counts: Sequence[int]) -> None:
        mine = self.statistics
        sums = [before + now for before, now in zip(self._before, counts, strict=True)]
        mine.requests, mine.flushes, mine.errors = sums[:3]
        if not self._files:
            mine.bytes_read, mine.bytes_written = sums[3:]

    def _turn(self, flags: int, queue: int) -> int | None:
        if queue not in self._queues:
            raise ProtocolError(f"a turn of queue {queue}")
        if flags & protocol.RESTED:
            self._require_kicked(queue)
            self._rested(queue)
        if not flags & protocol.INTERRUPT:
            return None
        self._interrupts.add(queue)
        return queue

    def _require_kicked(self, queue: int) -> None:
        if queue not in self._kicked:
            raise ProtocolError(f"queue {queue} was not kicked")

    def _rested(self, queue: int) -> None:
        """The process is done with what the queue was kicked for."""
        self._kicked.discard(queue)
        if queue in self._again:
            self._again.discard(queue)
            self._kick(queue)

    def _stopped(self, flags: int, body: memoryview) -> int | None:
        words = one_line(bytes(body[: protocol.MOST_TEXT]).decode("utf-8", "replace"))
        self._failure = QueueError(words)
        if flags & protocol.REFUSED and self._refusal is not None:
            self._failure = self._refusal
        return next(iter(self._queues), None)

    def _note(self, body: memoryview) -> None:
        self._notes += 1
        if self._notes <= protocol.MOST_NOTES:
            words = bytes(body[: protocol.MOST_TEXT]).decode("utf-8", "replace")
            tell(f"{self._name}: its process says: {one_line(words)}")

    def _reconfigure(self, config: bytes) -> None:
        if len(config) != len(self._own_config):
            raise ProtocolError(f"a configuration of {len(config)} bytes")
        self._own_config = config
        self._has_news = True

    def _answer(
        self, what: int, flags: int, number: int, generation: int, body: memoryview
    ) -> int | None:
        """Carry out an access to guest memory, and say what came of it; a queue whose driver is to
        be interrupted for it."""
        self._interrupted = None
        memory = self._memory
        status = protocol.OK
        answer: bytes | bytearray = b""
        if generation != self._generation or memory is None:
            status = protocol.STALE
        else:
            try:
                answer = self._access(memory, what, flags, number, body)
            except _Short as short:
                status = protocol.SHORT
                answer = protocol.MOVED.pack(short.moved)
            except GuestMemoryError as error:
                self._refusal = error
                status = _STATUS_OF.get(type(error), protocol.UNMAPPED)
                answer = str(error).encode()[: protocol.MOST_TEXT]
            except OSError as error:
                status = protocol.FAILED
                answer = protocol.ERRNO.pack(error.errno or 0)
        self._say(protocol.ANSWER, status, 0, answer)
        return self._interrupted

    def _access(
        self, memory: Any, what: int, flags: int, number: int, body: memoryview
    ) -> bytes | bytearray:
        """What comes of it: the answer's body."""
        if what == protocol.READ:
            return _read(memory, protocol.pieces_in(body))
        if what in (protocol.WRITE, protocol.RETURN):
            returned = None
            if what == protocol.RETURN:
                returned = protocol.returned_in(body)
                if returned.queue not in self._queues:
                    raise ProtocolError(f"chains of queue {returned.queue}")
                counts = _counts_in(returned.counts)
                if flags & protocol.RESTED:
                    self._require_kicked(returned.queue)
                body = body[protocol.RETURNED.size :]
            moves, pieces, then, data = protocol.write_in(body)
            if moves:
                moved, asked = self._move(memory, flags & protocol.OUT, number, moves, False)
                if moved < asked:
                    raise _Short(moved)
            _write(memory, pieces, bytes(data))
            if returned is not None:
                self._count(counts)
                return self._returned(memory, returned, then, bool(flags & protocol.RESTED))
            return _read(memory, then) if then else b""
        is_out, whole = what == protocol.MOVE_OUT, bool(flags & protocol.WHOLE)
        return protocol.MOVED.pack(self._move(memory, is_out, number, body, whole)[0])

    def _returned(
        self, memory: Any, returned: protocol.Returned, then: list[int], rests: bool
    ) -> bytes | bytearray:
        """The driver has been told of chains: see to its interrupt, and whether there is more for
        the process, which else `rests`. What fails here it finds out by itself: the write has been
        made."""
        queue = self._queues[returned.queue]
        _, avail, used = queue.addresses
        has_events = self._agreed & F_EVENT_IDX
        head: bytes | bytearray = b""
        asked = b""
        try:
            if has_events:
                # 2.7.6: flags, index, entries, event. One read is quicker than one of two pieces.
                head = memory.pread(6 + 2 * queue.size, avail)
                event = head[-2] | head[-1] << 8
                is_due = (returned.used - event - 1) & 0xFFFF < returned.chains
            else:
                head = memory.pread(4, avail)
                is_due = not head[0] & AVAIL_NO_INTERRUPT
            if is_due:
                self._interrupts.add(returned.queue)
                self._interrupted = returned.queue
            # A driver that polls is about to have more; one that is interrupted takes longer.
            looks = 0 if is_due else returned.looks
            while head[2] | head[3] << 8 == returned.known:
                if looks:
                    looks -= 1
                elif returned.looks and has_events and not asked:
                    asked = bytes(head[2:4])
                    if returned.number and sum(then[1::2]) <= protocol.MOST_WITH_KICK:
                        self._read_after[returned.queue] = returned.number, then
                    memory.pwrite(asked, used + 4 + 8 * queue.size)
                    # 2.7.10: once more, as the driver may not have seen it.
                else:
                    if asked and rests:
                        self._rested(returned.queue)
                    return head[:4] + asked
                head = memory.pread(4, avail)
            return _read(memory, then) if then else head[:4]
        except (GuestMemoryError, OSError):
            return head[:4]

    def _move(
        self, memory: Any, is_out: int, number: int, body: memoryview, whole: bool
    ) -> tuple[int, int]:
        """How many bytes were moved between memory and a file, and how many were to be."""
        if number >= len(self._files):
            raise ProtocolError(f"file {number}")
        file = self._files[number]
        moves = protocol.moves_in(body, 1 if is_out else 0, file.size, whole)
        if is_out:
            if file.read_only:
                raise ProtocolError(f"a write to file {number}, which is read-only")
            moved = _move_out(memory, moves, file.fd, whole)
            self.statistics.bytes_written += moved
        else:
            moved = _move_in(memory, file.fd, moves, whole)
            self.statistics.bytes_read += moved
        return moved, sum(moves[2::3])

    def _deliver(self, queues: Sequence[int] | Mapping[int, object]) -> None:
        """Have the transport look at what a queue's process has said. Without the lock."""
        for queue in list(queues):
            self._delivering = True
            try:
                self.serve(queue)
            finally:
                self._delivering = False

    # --- without a process ---

    def _lost(self, why: str) -> None:
        """The process is gone, or has to go. On the loop's thread, without the lock."""
        ended = self._processes.end(self._number)
        with self._lock:
            self._let_go()
            self.statistics.deaths += 1
            self.statistics.last_end = why or ended
            queues = dict(self._queues)
            self._kicked.clear()
            self._again.clear()
            if not self._goes_on:
                self._failure = QueueError(f"{self._name}: its process {why or ended}")
            elif self._memory is not None and self._config_without is None:
                self._owed = list(self._events_without)
                self._resume()
            if self._config_without is not None:
                self._own_config, self._has_news = self._config_without, True
        again = (
            "start the machine again"
            if not self._restarts
            else (f"ctl device restart {self._name} starts it again")
        )
        tell(
            f"{self._name}: its process {why or ended}; the machine goes on without this device; "
            f"{again}"
        )
        self._deliver(queues)
        self._tell_news()

    def _resume(self) -> None:
        """Find out by the used rings what the last process has answered, to go on behind that; by
        whom memory is kept back needs a reset."""
        assert self._memory is not None
        bases = {}
        try:
            for index, queue in self._queues.items():
                _, _, used = queue.addresses
                bases[index] = int.from_bytes(self._memory.pread(2, used + 2), "little")
                queue.resume(bases[index])
        except GuestMemoryError as error:
            self._failure = error
        self._bases = {index: bases.get(index, 0) for index in self._queues}

    def _tell_events(self, queue_index: int) -> bool:
        """Those of a queue that are owed, as far as there are buffers for them."""
        assert self._memory is not None
        queue, used = self._queues[queue_index], []
        for owed in [one for one in self._owed if one[0] == queue_index]:
            chains = queue.take(1)
            if not chains:
                break
            self._owed.remove(owed)
            used.append((chains[0].head, scatter(self._memory, chains[0].writable, owed[1])))
        return queue.publish(used) if used else False

    def _drop(self, queue_index: int) -> int:
        self._kept |= self._drops_without[queue_index]
        return 0

    def _fail(self, chain: Chain) -> int:
        """A disk's answer to what can't be carried out (virtio 1.2, 5.2.6)."""
        assert self._memory is not None
        if not chain.writable:
            raise QueueError(f"request {chain.head} has no room for its status byte")
        gpa, size = chain.writable[-1]
        self._memory.pwrite(_S_IOERR, gpa + size - 1)
        self.statistics.errors += 1
        return 1 if len(chain.writable) == 1 and size == 1 else 0


def _counts_in(body: bytes | memoryview) -> tuple[int, ...]:
    """What a process says that it has counted. Raises ProtocolError."""
    counts = protocol.COUNTS.unpack(body)
    if max(counts) > protocol.MOST_COUNT:
        raise ProtocolError(f"a count of {max(counts)}")
    return counts


# Guest memory of which each access is announced, or translated, has no verbs for many pieces.


def _read(memory: Any, pieces: list[int]) -> bytes | bytearray:
    if hasattr(memory, "read_many"):
        return memory.read_many(pieces)  # type: ignore[no-any-return]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return b"".join([memory.pread(size, gpa) for gpa, size in pairs])


def _write(memory: Any, pieces: list[int], data: bytes) -> None:
    if hasattr(memory, "write_many"):
        memory.write_many(pieces, data)
        return
    done = 0
    for gpa, size in zip(pieces[::2], pieces[1::2], strict=True):
        memory.pwrite(data[done : done + size], gpa)
        done += size


def _move_in(memory: Any, fd: int, moves: list[int], whole: bool) -> int:
    if hasattr(memory, "move_in") and not whole:
        return memory.move_in(fd, moves)  # type: ignore[no-any-return]
    total = 0
    for offset, gpa, size in zip(moves[::3], moves[1::3], moves[2::3], strict=True):
        total += memory.transfer_in(fd, offset, gpa, size)
    return total


def _move_out(memory: Any, moves: list[int], fd: int, whole: bool) -> int:
    if hasattr(memory, "move_out") and not whole:
        return memory.move_out(moves, fd)  # type: ignore[no-any-return]
    total = 0
    for gpa, offset, size in zip(moves[::3], moves[1::3], moves[2::3], strict=True):
        total += memory.transfer_out(gpa, size, fd, offset)
    return total
