"""The user's terminal as the guest's serial line: raw while the guest runs, restored always."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
import time
from collections.abc import Callable

from vmm.core.errors import tell
from vmm.core.event_loop import EventLoop, drain
from vmm.core.lean_typing import Protocol
from vmm.core.output import write_all
from vmm.core.raw_terminal import RawTerminal

ESCAPE = 0x01  # Ctrl-A
_HELP = b"\r\nCtrl-A x  quit    Ctrl-A Ctrl-A  send Ctrl-A    Ctrl-A h  this help\r\n"
_CHUNK = 4096
_MOST_TYPED = 1 << 20
"""Bytes from a terminal that wait for a guest which doesn't read them; later ones are lost."""
_TURN_READS = 16
_END = b"\x15\x04"  # Ctrl-U, Ctrl-D: an empty line, and the end of input
_END_SECONDS, _MOST_END_SECONDS = 0.5, 10.0
_PATIENCE = 0.2  # seconds that a key's effect waits for the guest's output
_TAIL = 8192

_LONGEST_SEQUENCE = 256
# An escape sequence (ECMA-48: CSI, a string such as OSC, others) or a UTF-8 character that has
# begun at the output's end and not ended.
_UNFINISHED = (
    rb"(\x1b(\[[0-?]*[ -/]*|[]PX^_][^\x07\x1b]*\x1b?|[ -/]*)"
    rb"|[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z"
)


class SerialInput(Protocol):
    """The receiving side of a UART."""

    def receive(self, data: bytes) -> int: ...
    def can_receive(self) -> bool: ...


class Console:
    """Copies serial output to stdout and stdin to the serial line, with back-pressure.

    On a terminal, Ctrl-A starts a command: x quits, h helps, Ctrl-A sends itself. Therefore a
    terminal is always read, and what the guest doesn't take is kept for it.

    A script on a pipe or in a file ends, and the guest's shell is to end with it: once the guest
    has taken all of it, it is told the end as a terminal tells it. More than once, for a shell
    that edits its line loses a Ctrl-D that is typed while a command runs. Input that was empty
    from the start (/dev/null) tells nothing.
    """

    def __init__(self, on_quit: Callable[[], None], stdin: int = 0, stdout: int = 1) -> None:
        self._on_quit = on_quit
        self._stdin = stdin
        self._terminal = RawTerminal(stdin)
        self._loop: EventLoop | None = None
        self._serial: SerialInput | None = None
        self._pending = bytearray()
        self._escaped = False
        self._watching = False
        self._ended = False
        self._last = b""  # of the input so far
        self._end_after: float | None = None  # seconds, once there is an end to tell
        self._room = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._tail = bytearray()
        self._output_lock = threading.Lock()
        try:
            # A number of its own: `abandon_output` puts something else behind it.
            self._stdout: int | None = os.dup(stdout)
            self._dropped: int | None = None
        except OSError:
            os.close(self._room)
            raise

    # -- output (on vCPU threads) -------------------------------------------------------------

    def output(self, data: bytes) -> None:
        """Write guest output to stdout; where that fails for good, the guest runs on without."""
        self._tail += data
        if len(self._tail) > 2 * _TAIL:
            del self._tail[:-_TAIL]
        with self._output_lock:
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._stdout is not None:
            try:
                write_all(self._stdout, data)
            except OSError as error:
                self._drop_output()
                if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe or terminal
                    tell(f"console output is lost from here on: {error.strerror}")

    def interject(self, data: bytes, patience: float = 0.0) -> bool:
        """Write something of ours where that cannot garble the guest's output; whether it did.

        Not in the middle of an escape sequence or a character, and not where nobody reads: the
        caller's thread must stay free. `patience`: seconds to wait for output under way.
        """
        import re  # most runs have nothing to say

        if not self._output_lock.acquire(timeout=patience):
            return False
        try:
            fits = not re.search(_UNFINISHED, self._tail[-_LONGEST_SEQUENCE:])
            if not fits or self._stdout is None or not _wait_writable(self._stdout, 0):
                return False
            self._write(data)
            return True
        finally:
            self._output_lock.release()

    def abandon_output(self) -> None:
        """Drop guest output from now on, also where an `output` hangs in its write.

        Python retries a write that a signal interrupts, so it has to find another file there.
        """
        stdout = self._stdout  # `output` may drop it meanwhile
        if stdout is not None:
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, stdout, inheritable=False)
            os.close(null)

    @property
    def output_fd(self) -> int | None:
        """The descriptor that it writes to; None where it has none, or was dropped."""
        return self._stdout

    def _drop_output(self) -> None:
        """Its number stays taken, by /dev/null: a sandbox knows it as one that nobody maps, and a
        module of Python's that is loaded late must not get it."""
        if self._stdout is not None:
            with contextlib.suppress(OSError):  # no number left for /dev/null: nor for a module
                self.abandon_output()
            self._dropped, self._stdout = self._stdout, None

    def tail(self) -> bytes:
        """The last few KiB of output."""
        return bytes(self._tail[-_TAIL:])

    # -- input (on the device loop's thread) --------------------------------------------------

    def attach(self, loop: EventLoop, serial: SerialInput) -> None:
        """Start forwarding input; a terminal becomes raw until `restore`."""
        self._loop = loop
        self._serial = serial
        self._terminal.enter()
        loop.add(self._room, self._on_room, unheld=True)
        if not self._watch():
            self._readable()

    def room(self) -> None:
        """The guest has read what it had: more input may go in (called on any thread)."""
        os.eventfd_write(self._room, 1)

    def suspend(self) -> None:
        """The process is about to be stopped: the terminal is somebody else's (from a handler)."""
        self._terminal.suspend()

    def resume(self) -> None:
        """The process was stopped and goes on: take the terminal again."""
        self._terminal.resume()

    def restore(self) -> None:
        """Give the terminal back as it was; any number of times."""
        self._terminal.restore()

    def close(self) -> None:
        self.restore()
        for fd in (self._stdout, self._dropped):
            if fd is not None:
                os.close(fd)
        self._stdout = self._dropped = None
        os.close(self._room)

    def _watch(self) -> bool:
        """Wait for input; False for what epoll refuses: a regular file or /dev/null."""
        assert self._loop is not None
        if self._watching or self._ended:
            return True
        try:
            # Also while the guest is paused: Ctrl-A x must work.
            self._loop.add(self._stdin, self._readable, unheld=True)
            self._watching = True
        except PermissionError:
            return False
        except OSError:
            self._ended = True  # stdin is closed
        return True

    def _unwatch(self) -> None:
        if self._watching and self._loop is not None:
            self._loop.remove(self._stdin)
            self._watching = False

    def _on_room(self) -> None:
        drain(self._room)
        self._feed()

    def _readable(self) -> None:
        if not self._pending or self._terminal.is_raw:
            self._read()
        self._feed()

    def _read(self) -> None:
        """What there is of input goes to `_pending`; at its end nothing is waited for."""
        try:
            data = os.read(self._stdin, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended = True
            self._unwatch()
            return
        self._last = data[-1:]
        if self._terminal.is_raw:
            data = self._commands(data)[: _MOST_TYPED - len(self._pending)]
        self._pending += data

    def _feed(self) -> None:
        """Hand pending input to the UART; while it is full, nothing more is read.

        A guest that takes all there is keeps this thread for a few reads at most: the rest of a
        file follows when the others have had their turn.
        """
        assert self._serial is not None
        for _ in range(_TURN_READS):
            if self._pending:
                accepted = self._serial.receive(bytes(self._pending[:_CHUNK]))
                del self._pending[:accepted]
            if self._pending or not self._serial.can_receive():
                if not self._terminal.is_raw:
                    self._unwatch()
                return  # `room` will be called
            if self._ended:
                self._begin_end()
                return
            if self._watching:
                return
            if self._watch():
                return
            self._read()  # of a regular file, which is always readable
        self.room()

    def _begin_end(self) -> None:
        """The guest has taken all that there was, and there will be no more."""
        if self._last and not self._terminal.is_raw and self._end_after is None:
            self._end_after = _END_SECONDS
            self._end_soon()

    def _end_soon(self) -> None:
        assert self._loop is not None and self._end_after is not None
        self._loop.set_timer(time.monotonic() + self._end_after, self._tell_end)
        self._end_after = min(2 * self._end_after, _MOST_END_SECONDS)

    def _tell_end(self) -> None:
        if not self._pending:
            self._pending += _END if self._last == b"\n" else b"\n" + _END
            self._last = b"\n"
            self._feed()
        self._end_soon()

    def _commands(self, data: bytes) -> bytes:
        """Take Ctrl-A commands out of what was typed."""
        if not self._escaped and ESCAPE not in data:
            return data
        kept = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    kept.append(byte)
                continue
            self._escaped = False
            if byte in b"xX":
                self._on_quit()
            elif byte in b"hH?":
                self._help()
            elif byte == ESCAPE:
                kept.append(ESCAPE)
            else:
                kept += bytes((ESCAPE, byte))
        return bytes(kept)

    def _help(self) -> None:
        """Help, where it fits and somebody reads it: this thread must stay free to end the run."""
        # A byte of the guest's that has just been written still holds the lock, mostly.
        self.interject(_HELP, _PATIENCE)


def _wait_writable(fd: int, milliseconds: int | None = None) -> bool:
    """Whether `fd` takes output, after that long at most (None: however long that takes)."""
    poll = select.poll()  # select() knows file descriptors below 1024 only
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(milliseconds))
