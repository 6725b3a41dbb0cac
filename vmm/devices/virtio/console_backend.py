"""What `--console` connects a port to: a pseudo-terminal, a file, or a socket to listen on."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tty
from collections.abc import Callable, Sequence

from vmm.core.errors import HostError, UsageError, tell
from vmm.core.raw_terminal import repeated
from vmm.core.suboptions import Suboptions
from vmm.core.unix_listener import UnixListener
from vmm.devices.virtio.console import MOST_PORTS, Port, VirtioConsole
from vmm.devices.virtio.device import Watch

MOST_FILE_BYTES = 1 << 30
SYNTAX = (
    "pty[,name=TEXT][,process] or file=FILE[,size=SIZE][,name=TEXT][,process] or "
    "socket=PATH[,name=TEXT][,process]"
)


def _ignore(*_: object, **__: object) -> None:
    """Nobody waits for anything."""


class _Stream:
    """A non-blocking fd, whose unsent bytes are kept until there is room; -1: none."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._unsent = b""
        self._watch: Watch = _ignore
        self._changed: Callable[[], None] = _ignore

    @property
    def descriptors(self) -> Sequence[int]:
        return (self.fd,)

    def start(self, changed: Callable[[], None], watch: Watch) -> None:
        self._watch, self._changed = watch, changed

    def stop(self) -> None:
        if self.fd >= 0:
            self._watch(self.fd, self._ready)
        self._watch = _ignore

    def connected(self) -> bool:
        return True

    def want(self, *, readable: bool, writable: bool) -> None:
        if self.fd >= 0:
            writable = writable or bool(self._unsent)
            self._watch(self.fd, self._ready, readable=readable, writable=writable)

    def _ready(self) -> None:
        with contextlib.suppress(OSError):
            self._flush()
        self._changed()

    def read(self, size: int) -> bytes:
        try:
            return os.read(self.fd, size)
        except OSError:  # nothing there, or (a pty's EIO) nobody
            return b""

    def write(self, data: bytes) -> bool:
        if not self._flush():
            return False
        self._unsent = data
        self._flush()
        return True

    def _flush(self) -> bool:
        while self._unsent:
            try:
                self._unsent = self._unsent[os.write(self.fd, self._unsent) :]
            except BlockingIOError:
                return False
            except OSError:
                self._unsent = b""
                raise
        return True

    def close(self) -> None:
        self.stop()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Pty(_Stream):
    """A pseudo-terminal. Its other end is held open here too, so that it outlives its users."""

    def __init__(self) -> None:
        """Raises OSError."""
        master, self._slave = os.openpty()
        repeated(lambda: tty.setraw(self._slave))
        os.set_blocking(master, False)
        self.path = os.ttyname(self._slave)
        super().__init__(master)

    @property
    def descriptors(self) -> Sequence[int]:
        return (self.fd, self._slave)

    def close(self) -> None:
        super().close()
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1


class OutputFile(_Stream):
    """A file that gets the output; there is no input. A FIFO or a terminal can be full for a
    while, a regular file always has room, and epoll can't wait for it.

    A regular file gets `most` bytes: no guest fills the host's disk. What comes after is dropped.
    """

    def __init__(self, fd: int, path: str, most: int) -> None:
        super().__init__(fd)
        self._path = path
        self._most = most
        self._always_ready = self._is_limited = stat.S_ISREG(os.fstat(fd).st_mode)
        self._left = most if self._is_limited else sys.maxsize
        self._told = False
        self.tell: Callable[[str], None] = tell

    def start(self, changed: Callable[[], None], watch: Watch) -> None:
        super().start(changed, watch)
        if self._is_limited:  # another process may have written to it before this one
            self._left = max(self._most - os.lseek(self.fd, 0, os.SEEK_CUR), 0)

    def write(self, data: bytes) -> bool:
        fitting = data[: self._left]
        if not super().write(fitting):
            return False
        self._left -= len(fitting)
        if len(fitting) < len(data) and not self._told:
            self._told = True
            self.tell(
                f"--console file={self._path} has its {self._most} bytes; further output is "
                "dropped: write size=SIZE for more"
            )
        return True

    def read(self, size: int) -> bytes:
        return b""

    def want(self, *, readable: bool, writable: bool) -> None:
        if not self._always_ready:
            try:
                super().want(readable=False, writable=writable)
            except PermissionError:  # /dev/null, and others that always have room
                self._always_ready = True

    def stop(self) -> None:
        if not self._always_ready:
            super().stop()
        self._watch = _ignore


class SocketServer(_Stream):
    """A listening Unix socket; one client at a time, others wait their turn."""

    def __init__(self, listener: UnixListener) -> None:
        super().__init__(-1)
        self._listener = listener

    @property
    def descriptors(self) -> Sequence[int]:
        return self._listener.descriptors

    def stop(self) -> None:
        self._watch(self._listener.fd, self._ready)
        super().stop()

    def connected(self) -> bool:
        if self.fd < 0:
            client = self._listener.take()
            if client is None:
                return False
            self._watch(self._listener.fd, self._ready)
            self.fd = client.detach()
        return True

    def want(self, *, readable: bool, writable: bool) -> None:
        if self.fd < 0:
            rest = self._listener.rest
            self._watch(self._listener.fd, self._ready, readable=True, after=rest)
        super().want(readable=readable, writable=writable)

    def read(self, size: int) -> bytes:
        if self.fd < 0:
            return b""
        try:
            data = os.read(self.fd, size)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._hang_up()
        return data

    def write(self, data: bytes) -> bool:
        if self.fd < 0:
            return True  # nobody listens
        try:
            return super().write(data)
        except OSError:  # the client is gone
            self._hang_up()
            return True

    def _hang_up(self) -> None:
        self._watch(self.fd, self._ready)
        os.close(self.fd)
        self.fd = -1
        self._unsent = b""

    def close(self) -> None:
        super().close()
        self._listener.close()


def open_console(texts: Sequence[str]) -> VirtioConsole:
    """One device with a port for each `--console TEXT`. Raises UsageError and HostError."""
    if len(texts) > MOST_PORTS:
        raise UsageError(f"--console is given {len(texts)} times; there are {MOST_PORTS} ports")
    ports: list[Port] = []
    streams: list[_Stream] = []
    apart: set[bool] = set()
    try:
        for text in texts:
            words = Suboptions("--console", text, SYNTAX)
            apart.add(words.flag("process"))
            if len(apart) > 1:
                raise UsageError(
                    f"--console {text}: all ports are one device's; write process at "
                    "each --console, or at none"
                )
            stream, name = _open_port(text, words)
            streams.append(stream)
            ports.append(Port(stream, name))
        if ports[0].name is not None:
            raise UsageError(
                f"--console {texts[0]}: the first one is a console; put one without name= first"
            )
    except BaseException:
        for port in ports:
            port.backend.close()
        raise
    device = VirtioConsole(ports)

    def say(sentence: str) -> None:
        device.tell_user(sentence)  # which becomes another one in a process of its own

    for stream in streams:
        if isinstance(stream, OutputFile):
            stream.tell = say
    if True in apart:
        device.descriptors = [fd for stream in streams for fd in stream.descriptors]
    return device


def _open_port(text: str, words: Suboptions) -> tuple[_Stream, str | None]:
    kind = words.one_of(("pty", "file", "socket"))
    where = "" if kind == "pty" and words.flag("pty") else words.take(kind)
    name = words.take("name")
    most = words.take_size("size") if kind == "file" else None
    if most is None:
        most = MOST_FILE_BYTES
    words.finish()
    if name is not None and len(os.fsencode(name)) > 64:
        raise words.error("a name has at most 64 bytes")
    if kind == "pty":
        try:
            pty = Pty()
        except OSError as error:
            raise HostError(
                f"--console {text}: no pseudo-terminal to be had: {error.strerror}; "
                "use file=FILE or socket=PATH"
            ) from error
        tell(f"--console {text} is {pty.path}")
        return pty, name
    assert where
    if kind == "socket":
        return SocketServer(UnixListener("--console socket=", where)), name
    return OutputFile(_open_output(where), where, most), name


def _open_output(path: str) -> int:
    try:
        # Non-blocking, so that a FIFO without a reader is an error and not a hang.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(path, flags, 0o666)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"--console file={path} cannot be written: {reason}; give another path"
        ) from error
