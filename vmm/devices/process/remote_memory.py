"""Guest memory as a device's process has it: every access is a message to pyvmm, which carries it
out or refuses it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence

from kvm_bindings.virtqueue import MOST_ENTRIES, Chains
from vmm.core.errors import AccessDenied, GuestMemoryError, PrivateAccess, UnmappedAccess
from vmm.core.lean_typing import NoReturn
from vmm.devices.process import protocol
from vmm.devices.process.protocol import HEAD
from vmm.devices.virtio.block_batch import after
from vmm.devices.virtio.queue import Chain, SplitQueue

_REFUSALS: dict[int, type[GuestMemoryError]] = {
    protocol.PRIVATE: PrivateAccess,
    protocol.UNMAPPED: UnmappedAccess,
    protocol.DENIED: AccessDenied,
}

_MOST_WRONG = 4
"""Guesses that were of no use, after which there are none until they would have been."""
_MOST_GUESSED = 128
"""Numbers of a guess, two for a piece: as many as a busy disk has requests in a batch."""


def looks_with(processors: int) -> int:
    """How often pyvmm looks at the ring of a patient device for what comes next: as such a device
    does in pyvmm's own process, but once where the guest can't go on meanwhile."""
    return 12 if processors > 1 else 1


LOOKS = looks_with(len(os.sched_getaffinity(0)))
TURNS_AT_ONCE = 64
"""Turns in which moves aren't kept, after some that failed."""


class StaleAccess(Exception):
    """The device has been reset since: nothing of what it was doing counts any more."""


class Redo(Exception):
    """What was taken for moved was not, or not all of it: the turn has to be done again, which a
    disk's may."""


class _Short(Exception):
    """So much was moved, and less than asked for: the file ends, or the host is slow."""

    def __init__(self, moved: int) -> None:
        super().__init__()
        self.moved = moved


class PyvmmIsGone(Exception):
    """The other end of the socket."""


class Channel:
    """The process's end of the socket. `backlog` has what came while an answer was waited for."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = memoryview(bytearray(protocol.LONGEST))
        self.backlog: list[bytes] = []
        self.generation = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def say(self, what: int, flags: int = 0, queue: int = 0, body: bytes = b"") -> None:
        try:
            self._socket.send(HEAD.pack(what, flags, queue, self.generation) + body)
        except OSError as error:
            raise PyvmmIsGone from error

    def hear(self) -> memoryview:
        """The next packet; good until the next call. Raises PyvmmIsGone."""
        try:
            size = self._socket.recv_into(self._buffer)
        except OSError as error:
            raise PyvmmIsGone from error
        if size < HEAD.size:
            raise PyvmmIsGone
        return self._buffer[:size]

    def ask(self, what: int, queue: int, body: bytes, flags: int = 0) -> memoryview:
        """Say it, and wait for what it came to: the answer's body. Raises GuestMemoryError,
        OSError, StaleAccess."""
        self.say(what, flags, queue, body)
        while True:
            packet = self.hear()
            if packet[0] == protocol.ANSWER:
                break
            # What a KICK brings is older than the answer, which may be of the same rings.
            is_old = packet[0] == protocol.KICK
            self.backlog.append(bytes(packet[: HEAD.size] if is_old else packet))
        status, body_of_answer = packet[1], packet[HEAD.size :]
        if status != protocol.OK:
            self._raise(status, body_of_answer)
        return body_of_answer

    @staticmethod
    def _raise(status: int, body: memoryview) -> NoReturn:
        if status == protocol.STALE:
            raise StaleAccess
        if status == protocol.SHORT:
            raise _Short(protocol.MOVED.unpack(body)[0])
        if status == protocol.FAILED:
            (number,) = protocol.ERRNO.unpack(body)
            raise OSError(number, os.strerror(number))
        raise _REFUSALS[status](bytes(body).decode("utf-8", "replace"))


class RemoteMemory:
    """GuestMemory's verbs, as vmm.devices.virtio.device.GuestMemory has them."""

    def __init__(self, channel: Channel, files: dict[int, int]) -> None:
        """`files`: for each fd that bytes may be moved from and to, its number over there."""
        self._ask = channel.ask
        self._files = files

    def pread(self, size: int, gpa: int) -> bytes:
        ask, most = self._ask, protocol.MOST_DATA
        if 0 < size <= most:
            return bytes(ask(protocol.READ, 0, protocol.words((gpa, size))))
        parts = [(at, min(most, gpa + size - at)) for at in range(gpa, gpa + size, most)]
        return b"".join([bytes(ask(protocol.READ, 0, protocol.words(part))) for part in parts])

    def pwrite(self, data: bytes | memoryview, gpa: int) -> None:
        for at in range(0, len(data), protocol.MOST_DATA):
            part = bytes(data[at : at + protocol.MOST_DATA])
            self.write([gpa + at, len(part)], part)

    def write(
        self,
        pieces: list[int],
        data: bytes,
        then: list[int] | None = None,
        returned: bytes = b"",
        flags: int = 0,
    ) -> memoryview:
        """Write `data` over the pieces (gpa, size, gpa...), then read the pieces of `then`. With
        what chains are `returned` by it (protocol.RETURNED) it is a RETURN, with these flags."""
        then = then or []
        head = returned + protocol.WRITE_HEAD.pack(0, len(pieces) // 2, len(then) // 2)
        what = protocol.RETURN if returned else protocol.WRITE
        return self._ask(what, 0, head + protocol.words(pieces + then) + data, flags)

    def transfer_in(self, src_fd: int, src_offset: int, gpa: int, size: int) -> int:
        return self._whole(protocol.MOVE_IN, src_fd, src_offset, gpa, size)

    def transfer_out(self, gpa: int, size: int, dst_fd: int, dst_offset: int) -> int:
        return self._whole(protocol.MOVE_OUT, dst_fd, gpa, dst_offset, size)

    def discard(self, gpa: int, size: int) -> None:
        """Not for a device in a process: none that may be in one does it."""
        raise OSError(errno.EOPNOTSUPP, f"discard of {size:#x} bytes at {gpa:#x}")

    def _whole(self, what: int, fd: int, source: int, target: int, size: int) -> int:
        """One transfer, in as many messages as it takes; short at the file's end alone."""
        total = 0
        while total < size:
            part = min(size - total, protocol.MOST_WHOLE)
            moves = protocol.words((source + total, target + total, part))
            (moved,) = protocol.MOVED.unpack(
                self._ask(what, self._files[fd], moves, protocol.WHOLE)
            )
            total += moved
            if moved < part:
                break
        return total


class RemoteBatches(RemoteMemory):
    """With the verbs for many pieces, where guest memory has them over there.

    Where it may, it keeps a list of moves until what comes next, which mostly is what tells the
    driver of them: one message instead of two. Who asked takes them for done. Where they turn out
    not to be, the message after that raises Redo, and nothing else was done.

    Where it may guess, a look at a ring brings what was read after the last one: drivers use the
    same places again, for the headers of their requests. As that is read after the ring, it is what
    the ring speaks of.
    """

    def __init__(
        self,
        channel: Channel,
        files: dict[int, int],
        *,
        may_keep: bool,
        may_guess: bool,
        counts: Callable[[], bytes],
        kicked: set[int],
    ) -> None:
        """`counts`: what the device has counted (protocol.COUNTS). `kicked`: queues whose KICK
        isn't done with."""
        self._channel_ask = channel.ask
        super().__init__(channel, files)
        self._ask = self._ask_after_moves
        self.counts, self.kicked = counts, kicked
        self._may_keep = may_keep
        self._kept: tuple[int, int, list[int]] | None = None
        self._at_once = 0
        self._may_guess = may_guess
        self._guess: list[int] = []
        # What was read with a ring: pieces, and their bytes.
        self._guessed: tuple[list[int], bytes] | None = None
        self._wrong = 0

    def begin(self) -> None:
        """A turn begins."""
        self._kept = None
        self._guessed = None
        if self._at_once:
            self._at_once -= 1

    def end(self) -> None:
        """A turn ends. Raises Redo."""
        if self._kept is not None:
            self._move_kept()

    def _ask_after_moves(self, what: int, queue: int, body: bytes, flags: int = 0) -> memoryview:
        if self._kept is not None:
            self._move_kept()
        return self._channel_ask(what, queue, body, flags)

    def _move_kept(self) -> None:
        assert self._kept is not None
        (what, number, moves), self._kept = self._kept, None
        while moves:
            try:
                answer = self._channel_ask(what, number, protocol.words(moves))
            except (GuestMemoryError, OSError):
                raise self._redo() from None
            moves = self._left(moves, protocol.MOVED.unpack(answer)[0])

    def _left(self, moves: list[int], moved: int) -> list[int]:
        """What is to be done of the moves yet. Raises Redo where it is of no use."""
        if not moved:
            raise self._redo()
        return after(moves, moved) if moved < sum(moves[2::3]) else []

    def _redo(self) -> Redo:
        """So that it becomes clear what is in the way; a disk that is slow stays so."""
        self._at_once = TURNS_AT_ONCE
        return Redo()

    def write(
        self,
        pieces: list[int],
        data: bytes,
        then: list[int] | None = None,
        returned: bytes = b"",
        flags: int = 0,
    ) -> memoryview:
        if self._kept is None:
            return super().write(pieces, data, then, returned, flags)
        (kept, number, moves), self._kept = self._kept, None
        then = then or []
        flags |= protocol.OUT if kept == protocol.MOVE_OUT else 0
        what = protocol.RETURN if returned else protocol.WRITE
        while True:
            counts = len(moves) // 3, len(pieces) // 2, len(then) // 2
            numbers = protocol.words(moves + pieces + then)
            body = returned + protocol.WRITE_HEAD.pack(*counts) + numbers + data
            try:
                return self._channel_ask(what, number, body, flags)
            except _Short as short:
                moves = self._left(moves, short.moved)
            except (GuestMemoryError, OSError):
                raise self._redo() from None

    def look(self, ring: list[int]) -> bytes:
        """What is in a ring, by its pieces."""
        pieces = self.with_guesses(ring)
        if pieces is ring:
            return self._read_many(ring)
        try:
            data = self._read_many(pieces)
        except GuestMemoryError:
            self._guess = []  # which may have been what was refused
            return self._read_many(ring)
        return self.without_guesses(pieces, len(ring), data)

    def without_guesses(self, pieces: list[int], ring: int, data: bytes) -> bytes:
        """What is in a ring, the first `ring` numbers of these pieces; the guesses that were read
        with it are kept."""
        size = sum(pieces[1:ring:2])
        if len(pieces) > ring:
            self._guessed = pieces[ring:], data[size:]
        return data[:size]

    def forget_guesses(self) -> None:
        """A ring has come without any: those from before are older than what it speaks of."""
        self._guessed = None

    def with_guesses(self, ring: list[int]) -> list[int]:
        """A ring's pieces, and what is likely to be read with it."""
        self._guessed = None
        if self._guess and self._wrong < _MOST_WRONG:
            pieces = ring + self._guess
            if sum(pieces[1::2]) <= protocol.MOST_DATA:
                return pieces
        return ring

    def read_many(self, pieces: list[int]) -> bytes:
        if not self._may_guess or len(pieces) > _MOST_GUESSED:
            return self._read_many(pieces)
        if self._guessed is not None:
            guessed, self._guessed = self._guessed, None
            found = _part(*guessed, pieces)
            if found is not None:
                self._wrong = 0
                return found
            self._wrong += 1
        elif self._wrong and pieces == self._guess:
            self._wrong = 0  # it would have been right
        self._guess = pieces
        return self._read_many(pieces)

    def _read_many(self, pieces: list[int]) -> bytes:
        size = sum(pieces[1::2])
        if size <= protocol.MOST_DATA and len(pieces) <= 2 * protocol.MOST_PIECES:
            return bytes(self._ask(protocol.READ, 0, protocol.words(pieces)))
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        return b"".join([self.pread(size, gpa) for gpa, size in pairs])

    def write_many(self, pieces: list[int], data: bytes) -> None:
        if len(data) <= protocol.MOST_DATA and len(pieces) <= 2 * protocol.MOST_PIECES:
            self.write(pieces, data)
            return
        done = 0
        for gpa, size in zip(pieces[::2], pieces[1::2], strict=True):
            self.pwrite(data[done : done + size], gpa)
            done += size

    def move_in(self, src_fd: int, moves: list[int]) -> int:
        return self._moved(protocol.MOVE_IN, src_fd, moves)

    def move_out(self, moves: list[int], dst_fd: int) -> int:
        return self._moved(protocol.MOVE_OUT, dst_fd, moves)

    def _moved(self, what: int, fd: int, moves: list[int]) -> int:
        """In as many messages as it takes; short where one was."""
        total = sum(moves[2::3])
        if self._may_keep and not self._at_once and self._kept is None and _is_one(moves, total):
            self._kept = what, self._files[fd], moves
            return total
        total = 0
        for part in _in_messages(moves):
            (moved,) = protocol.MOVED.unpack(self._ask(what, self._files[fd], protocol.words(part)))
            total += moved
            if moved < sum(part[2::3]):
                break
        return total


def _part(all_pieces: list[int], data: bytes, pieces: list[int]) -> bytes | None:
    """What is in some of the pieces that this data is of; None where one isn't among them."""
    if pieces == all_pieces:
        return data
    at = 0
    found = {}
    for gpa, size in zip(all_pieces[::2], all_pieces[1::2], strict=True):
        found[gpa, size] = data[at : at + size]
        at += size
    try:
        pairs = zip(pieces[::2], pieces[1::2], strict=True)
        return b"".join([found[pair] for pair in pairs])
    except KeyError:
        return None


def _is_one(moves: list[int], size: int) -> bool:
    """Whether one message may have them all."""
    return len(moves) <= 3 * protocol.MOST_PIECES and size <= protocol.MOST_MOVED


def _in_messages(moves: list[int]) -> Iterator[list[int]]:
    """The same moves in lists that are within a message's limits."""
    if _is_one(moves, sum(moves[2::3])):
        yield moves
        return
    part: list[int] = []
    size = 0
    for source, target, length in zip(moves[::3], moves[1::3], moves[2::3], strict=True):
        done = 0
        while done < length:
            if size == protocol.MOST_MOVED or len(part) == 3 * protocol.MOST_PIECES:
                yield part
                part, size = [], 0
            step = min(length - done, protocol.MOST_MOVED - size)
            part += (source + done, target + done, step)
            done += step
            size += step
    yield part


class _QueueMemory:
    """What a queue reads and writes, with what it reads next brought along: a look at the rings
    with a notify, and with what it returns; the index and the rings once it has asked for a notify.

    That there is nothing new counts once, and until the next turn: the driver may have moved on.
    Chains that were seen and not taken stay what they are, as the driver must leave them alone.
    """

    def __init__(self, memory: RemoteBatches, ring: list[int]) -> None:
        self._memory = memory
        self._ring = ring
        self._index = ring[0]
        self._look = ring if ring[3] <= 2 * MOST_ENTRIES else []
        self._nothing = bytes(sum(ring[1::2]) - 4)
        self._brought: bytes | bytearray | None = None
        self._seen: bytes | bytearray | None = None  # the last look that found something
        self._index_brought: bytes | None = None
        self.next = 0
        """The number of the chain that is taken next, by the available index."""
        self.returning: tuple[int, int, int] | None = None
        """What is written next tells the driver of chains: the first of protocol.RETURNED."""
        self.looks = 0
        """How often pyvmm looks for what comes next then."""
        self.is_last = False
        """Whether nothing else is under way then."""
        self.is_seen_to = False
        """Whether pyvmm has seen to the interrupt for what was returned last."""
        self._asked_at = b""  # the index that pyvmm has asked for a notify of, since then
        # What the last RETURN had read afterwards, and its number: a KICK brings it again.
        self._after: list[int] = []
        self._number = 0

    def bring(self, ring: bytes | None, number: int) -> None:
        """A turn begins, with this in the rings (None: not known), or at all that the RETURN with
        this number had read."""
        if ring is not None and number:
            is_last = number == self._number
            pieces = self._after if is_last else self._ring
            ring = self._memory.without_guesses(pieces, len(self._ring), ring)
        self._brought = ring
        if ring is not None:
            self._seen = ring
        self._index_brought = None
        self._asked_at = b""

    def _seen_index(self) -> int:
        """How far the driver had come when it was last looked at."""
        return self.next if self._seen is None else self._seen[2] | self._seen[3] << 8

    def pread(self, size: int, gpa: int) -> bytes:
        if gpa == self._index and size == 4 and self._index_brought is not None:
            found, self._index_brought = self._index_brought, None
            return found
        return self._memory.pread(size, gpa)

    def pwrite(self, data: bytes, gpa: int) -> None:
        """Ask for a notify, and look once more."""
        asked, self._asked_at = self._asked_at, b""
        if data == asked:
            self._index_brought = b"\0\0" + asked  # nothing had come since
            return
        answer = self._memory.write([gpa, len(data)], data, [self._index, 4, *self._look])
        self._index_brought = bytes(answer[:4])
        self._brought = None
        self._memory.forget_guesses()
        if answer[2:4] != data and len(answer) > 4:
            self._brought = self._seen = bytes(answer[4:])  # it is there already

    def read_many(self, pieces: list[int]) -> bytes | bytearray:
        if pieces != self._ring:
            return self._memory.read_many(pieces)
        found, self._brought = self._brought, None
        if found is not None:
            return found
        if self._seen is None or self._seen_index() == self.next:
            self._seen = self._memory.look(pieces)
        return self._seen

    def write_many(self, pieces: list[int], data: bytes) -> None:
        self._index_brought = self._brought = None
        self._asked_at = b""
        self.is_seen_to = False
        returning, self.returning = self.returning, None
        is_too_much = len(data) > protocol.MOST_DATA or len(pieces) > 2 * protocol.MOST_PIECES
        if returning is None or is_too_much:
            self._memory.write_many(pieces, data)
            return
        looks, known, then = self.looks, self.next, self._look
        if looks and then:
            then = self._after = self._memory.with_guesses(then)
            self._number = self._number % 255 + 1
        elif not looks:
            self._memory.forget_guesses()
            known = self._seen_index()  # who takes his time has chains to go on with
        number = self._number if looks and then else 0
        returned = protocol.RETURNED.pack(*returning, known, looks, number, self._memory.counts())
        queue, kicked = returning[0], self._memory.kicked
        flags = protocol.RESTED if looks and self.is_last and queue in kicked else 0
        found = bytes(self._memory.write(pieces, data, then, returned, flags))
        if flags and len(found) == 6:
            kicked.discard(queue)
        self.is_seen_to = bool(found)
        if len(found) > 6:
            self._brought = self._memory.without_guesses(then, len(self._ring), found)
            self._seen = self._brought
        elif looks and then and found[2:4] == known.to_bytes(2, "little"):
            # Nothing new, so that nothing else is looked at.
            self._brought, self._asked_at = found[:4] + self._nothing, found[4:]


class RemoteQueue(SplitQueue):
    """A queue that asks for little: see _QueueMemory."""

    __slots__ = ("_number", "_remote")

    def __init__(
        self,
        memory: RemoteBatches,
        number: int,
        size: int,
        desc: int,
        avail: int,
        used: int,
        features: int,
    ) -> None:
        """`number`: which of the device's queues it is."""
        self._number = number
        self._remote = _QueueMemory(memory, protocol.ring_pieces(size, desc, avail))
        super().__init__(self._remote, size, desc, avail, used, features)

    def begin(self, ring: bytes | None, number: int) -> None:
        """A turn begins, with what a KICK has brought: its flags are `number`."""
        self._remote.bring(ring, number)

    def publish_elements(
        self, elements: bytes, before: Sequence[int] = (), data: bytes = b""
    ) -> bool:
        count = len(elements) // 8
        remote = self._remote
        remote.next = self._next_avail
        # A driver that can't be asked for a notify gives one for all that it has.
        remote.looks = LOOKS if self.patience and self._event_index else 0
        remote.is_last = count == self.outstanding and self.unfinished is None
        remote.returning = self._number, (self._next_used + count) & 0xFFFF, count
        return super().publish_elements(elements, before, data)

    def _take(self, most: int) -> Chains | list[Chain]:
        self._remote.next = self._next_avail
        return super()._take(most)

    def _wants_interrupt(self, index: int, count: int) -> bool:
        return not self._remote.is_seen_to and super()._wants_interrupt(index, count)

    def rewind(self) -> None:
        """What was taken and not returned is to be taken again."""
        self.resume(self._next_used)
        self.unfinished = None
