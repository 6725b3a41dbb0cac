"""The byte streams between the lab machine and its host, and the machine's end.

Each stream is a socket pair with QEMU at the other end, or a pseudo-terminal with Bochs. One
thread, no callbacks: the caller that waits for something calls `pump` until it is there. While no
caller does, the guest waits.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import tty
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

_CHUNK = 1 << 16
_PIECE = 1 << 10


Sink = Callable[[bytes], None]  # takes what a stream delivers


@dataclass(slots=True)
class EndMark:
    """Takes the mark that ends a stream out of it: the writer's last bytes."""

    mark: bytes
    complete: bool = False
    _held: bytes = b""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on: all but the mark, and bytes that may be its beginning."""
        data = self._held + data
        at = data.find(self.mark)
        if at >= 0:
            self.complete, self._held = True, b""
            return data[:at]
        keep = min(len(data), len(self.mark) - 1)
        while keep and not self.mark.startswith(data[len(data) - keep :]):
            keep -= 1
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]

    def rest(self) -> bytes:
        """What was held back, once it is known that nothing follows."""
        held, self._held = self._held, b""
        return held


@dataclass(slots=True)
class Pieces:
    """Input for a line that loses what isn't read in time, and that has no end of its own.

    The reader asks for each piece with a byte; a piece is its length, a newline and the bytes, one
    of length 0 is the end.
    """

    waiting: bytearray = field(default_factory=bytearray)
    ended: bool = False
    _asked: bool = False

    def ask(self) -> None:
        self._asked = True

    def next(self) -> bytes:
        """What can be sent now, if anything."""
        if not self._asked or not (self.waiting or self.ended):
            return b""
        self._asked = False
        piece = bytes(self.waiting[:_PIECE])
        del self.waiting[:_PIECE]
        return b"%d\n%b" % (len(piece), piece)


class End(Protocol):
    """What a stream needs of a socket."""

    def fileno(self) -> int: ...

    def recv(self, size: int, /) -> bytes: ...

    def send(self, data: bytearray, /) -> int: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class TerminalEnd:
    """Our end of a pseudo-terminal, in the manner of a socket; the other end is opened by name.

    That end is held open here as well: without, ours would be hung up until it is opened.
    """

    def __init__(self) -> None:
        self._ours, self._theirs = os.openpty()
        os.set_blocking(self._ours, False)
        tty.setraw(self._theirs)
        self.name = os.ttyname(self._theirs)

    def fileno(self) -> int:
        return self._ours

    def recv(self, size: int, /) -> bytes:
        return os.read(self._ours, size)

    def send(self, data: bytearray, /) -> int:
        return os.write(self._ours, data)

    def shutdown(self, how: int, /) -> None:
        """A line has no end."""

    def close(self) -> None:
        os.close(self._ours)
        os.close(self._theirs)


@dataclass(slots=True)
class Stream:
    """The host's end of one stream."""

    name: str
    socket: End
    sink: Sink | None = None
    mark: EndMark | None = None
    outgoing: bytearray = field(default_factory=bytearray)
    closing: bool = False  # the writing side is shut down once `outgoing` is sent
    open: bool = True
    pieces: Pieces | None = None  # how the input goes, unless just so

    @property
    def backlog(self) -> int:
        """Bytes given to it that the other end hasn't taken."""
        return len(self.outgoing) + (len(self.pieces.waiting) if self.pieces is not None else 0)


def stream_pair(name: str) -> tuple[Stream, socket.socket]:
    """A stream, and the socket to be inherited by QEMU."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    return Stream(name, ours), theirs


class Pump:
    """Moves bytes for a set of streams, and notices when a process ends."""

    def __init__(self, streams: list[Stream], process_fd: int) -> None:
        # poll(2), unlike epoll, also takes regular files, which standard input may be.
        self._selector = selectors.PollSelector()
        self._streams = streams
        self._process_fd = process_fd
        self._input: tuple[int, Stream] | None = None
        self.process_ended = False
        for stream in streams:
            self._selector.register(stream.socket, selectors.EVENT_READ, stream)
        self._selector.register(process_fd, selectors.EVENT_READ)

    def feed_from(self, fd: int, stream: Stream) -> None:
        """From now on, what can be read from `fd` goes into `stream`; its end ends the stream."""
        self._input = (fd, stream)

    def send(self, stream: Stream, data: bytes) -> None:
        if stream.pieces is not None:
            stream.pieces.waiting += data
            data = stream.pieces.next()
        stream.outgoing += data
        self._flush(stream)

    def close_sending(self, stream: Stream) -> None:
        if stream.pieces is not None:
            stream.pieces.ended = True
            stream.outgoing += stream.pieces.next()
        else:
            stream.closing = True
        self._flush(stream)

    def pump(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for something to happen, and does all that did."""
        self._watch_input()
        for stream in self._streams:
            if stream.open:
                events = selectors.EVENT_READ
                events |= selectors.EVENT_WRITE if stream.outgoing else 0
                self._selector.modify(stream.socket, events, stream)
        for key, events in self._selector.select(timeout):
            if key.fd == self._process_fd:
                self.process_ended = True
            elif isinstance(key.data, Stream):
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if events & selectors.EVENT_READ:
                    self._receive(key.data)
            else:
                self._read_input()

    def drain(self) -> None:
        """After the process's end: what it left in the sockets."""
        for stream in self._streams:
            while stream.open and self._receive(stream):
                pass

    def close(self) -> None:
        """The streams stay open: they belong to their makers."""
        self._selector.close()

    def _watch_input(self) -> None:
        """The input is read no faster than the guest takes it."""
        if self._input is None:
            return
        fd, stream = self._input
        watched = fd in self._selector.get_map()
        wanted = stream.backlog < _CHUNK and stream.open
        if wanted and not watched:
            self._selector.register(fd, selectors.EVENT_READ)
        elif watched and not wanted:
            self._selector.unregister(fd)

    def _read_input(self) -> None:
        if self._input is None:
            return
        fd, stream = self._input
        try:
            data = os.read(fd, _CHUNK)
        except OSError:
            data = b""  # a terminal that hung up, or a directory: there is no more input
        if data:
            self.send(stream, data)
            return
        self._selector.unregister(fd)
        self._input = None
        self.close_sending(stream)

    def _flush(self, stream: Stream) -> None:
        try:
            while stream.outgoing and stream.open:
                sent = stream.socket.send(stream.outgoing[:_CHUNK])
                del stream.outgoing[:sent]
        except BlockingIOError:
            return
        except OSError:
            stream.outgoing.clear()  # QEMU is gone; its end is noticed elsewhere
        if stream.closing and not stream.outgoing:
            stream.closing = False
            with contextlib.suppress(OSError):
                stream.socket.shutdown(socket.SHUT_WR)

    def _receive(self, stream: Stream) -> bool:
        try:
            data = stream.socket.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            stream.open = False
            self._selector.unregister(stream.socket)
            data = stream.mark.rest() if stream.mark is not None else b""
        elif stream.mark is not None:
            data = stream.mark.feed(data)
        elif stream.pieces is not None:
            stream.pieces.ask()
            stream.outgoing += stream.pieces.next()
            self._flush(stream)
        if data and stream.sink is not None:
            stream.sink(data)
        return stream.open
