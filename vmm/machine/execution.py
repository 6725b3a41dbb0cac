"""One command in the guest (--exec): its streams, its status, and a folder that goes in and out.

The guest's init (firmware/init/init.c, which has the other side) finds ports of a virtio console
by their names. Through "pyvmm.command" it gets the command and tells how it ended; "pyvmm.input",
"pyvmm.output" and "pyvmm.errors" are its streams, "pyvmm.share-in" and "pyvmm.share-out" carry a
tar archive.
Nothing that the guest says is believed but its status: everything else only has bounds.
"""

from __future__ import annotations

import contextlib
import os
import select
import tempfile
from collections.abc import Callable

from vmm.control.console import Console
from vmm.core.errors import UsageError, one_line, tell
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.share import Share, pack, parse_share, take_back
from vmm.devices.virtio.console import Port, VirtioConsole
from vmm.devices.virtio.device import Watch
from vmm.exits.outcome import FAILED, STOPPED, Outcome

if TYPE_CHECKING:
    from typing import IO

OWN_STATUS = 125
"""What pyvmm ends with when there is no status of the command to pass on, as env(1) does."""
MOST_COMMAND = 1 << 16
_MOST_LINE = 512
_PIPE_BUF = 4096  # a pipe that poll calls writable takes that much without waiting
_BROKEN_PIPE = 128 + 13  # what a shell says of a command that SIGPIPE has ended
_LAST_LINES = 8


def _ignore(*_: object, **__: object) -> None:
    """Nobody waits for anything."""


class _Fd:
    """What a port is connected to, in the manner of `vmm.devices.virtio.console.ConsoleBackend`.

    `source` and `target` are copies of descriptors that may be anything: a pipe, a terminal, a
    file. They are shared with other processes, so that they stay blocking ones: nothing is read or
    written unless poll says that there is something, or room.
    """

    def __init__(self, source: int | None = None, target: int | None = None) -> None:
        self._source, self._target = (None if fd is None else _copy(fd) for fd in (source, target))
        self._unsent = b""
        self.taken = 0
        self._ended = False
        self._watch: Watch = _ignore
        self._changed: Callable[[], None] = _ignore
        self.broken: Callable[[], None] = _ignore
        """Called when nobody reads what the command writes."""
        self.progressed: Callable[[], None] = _ignore
        """Called when more of it is out."""

    def start(self, changed: Callable[[], None], watch: Watch) -> None:
        self._changed, self._watch = changed, watch

    def stop(self) -> None:
        for fd in (self._source, self._target):
            if fd is not None:
                self._watch(fd, self._ready)
        self._watch = _ignore

    def connected(self) -> bool:
        """The input's end is the port's: a read there gives nothing then."""
        return not self._ended

    def read(self, size: int) -> bytes:
        if self._ended or self._source is None or not _is_ready(self._source, select.POLLIN):
            return b""
        try:
            data = os.read(self._source, size)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        self._ended = not data
        return data

    def write(self, data: bytes) -> bool:
        if not self._flush():
            return False
        self._unsent = data
        self._flush()
        self.progressed()
        return True

    def _flush(self) -> bool:
        """Whether all is out."""
        while self._unsent and self._target is not None:
            if not _is_ready(self._target, select.POLLOUT):
                return False
            try:
                written = os.write(self._target, self._unsent[:_PIPE_BUF])
            except BlockingIOError:
                return False
            except BrokenPipeError:
                self._drop()
                self.broken()
                return True
            except OSError as error:
                self._drop()
                tell(f"the command's output is lost from here on: {error.strerror}")
                return True
            self._unsent = self._unsent[written:]
            self.taken += written
        self.taken += len(self._unsent)
        self._unsent = b""
        return True

    def _drop(self) -> None:
        if self._target is not None:
            self._watch(self._target, self._ready)
            os.close(self._target)
            self._target = None

    def _ready(self) -> None:
        self._flush()
        self._changed()
        self.progressed()

    def want(self, *, readable: bool, writable: bool) -> None:
        if self._source is not None:
            self._wait(self._source, readable=readable and not self._ended)
        if self._target is not None:
            self._wait(self._target, writable=writable or bool(self._unsent))

    def _wait(self, fd: int, *, readable: bool = False, writable: bool = False) -> None:
        try:
            self._watch(fd, self._ready, readable=readable, writable=writable)
        except PermissionError:
            """A regular file or /dev/null, which never makes anybody wait."""

    def close(self) -> None:
        self.stop()
        for fd in (self._source, self._target):
            if fd is not None:
                os.close(fd)
        self._source = self._target = None


class _Command:
    """The port of the protocol: lines both ways."""

    def __init__(self, command: bytes, heard: Callable[[bytes], None]) -> None:
        self._waiting = bytearray(b"run %d\n" % len(command) + command)
        self._line = bytearray()
        self._heard = heard
        self._started = False
        self.wake: Callable[[], None] = _ignore
        """Has the device ask for more input, soon."""

    def say(self, line: bytes) -> None:
        """On the device loop's thread."""
        self._waiting += line + b"\n"
        if self._started:
            self.wake()

    def start(self, changed: Callable[[], None], watch: Watch) -> None:
        self._started = True

    def stop(self) -> None:
        self._started = False

    def connected(self) -> bool:
        return True

    def read(self, size: int) -> bytes:
        data = bytes(self._waiting[:size])
        del self._waiting[:size]
        return data

    def write(self, data: bytes) -> bool:
        self._line += data
        *lines, rest = bytes(self._line).split(b"\n")
        for line in lines[:16]:
            self._heard(line)
        self._line = bytearray(rest[:_MOST_LINE])
        return True

    def want(self, *, readable: bool, writable: bool) -> None:
        """It is here, always."""

    def close(self) -> None:
        """Nothing is open."""


class _Bounded(_Fd):
    """The folder's archive that comes back: kept up to a limit."""

    def __init__(self, target: int, limit: int) -> None:
        super().__init__(target=target)
        self._left = limit
        self.exceeded = False

    def write(self, data: bytes) -> bool:
        if len(data) > self._left:
            self.exceeded = True
            self.taken += len(data)
            self.progressed()
            return True
        self._left -= len(data)
        return super().write(data)


class _Shared:
    """The folder, and what comes back of it."""

    def __init__(self, share: Share, archive: IO[bytes]) -> None:
        self.share = share
        self.archive = archive
        self.through: Callable[[], None] | None = None
        """What has `take_back` done in another process; raises OutputError."""

    def take_back(self) -> None:
        """Put the archive's files into the folder. Raises OutputError."""
        self.archive.seek(0)
        take_back(self.share, self.archive)


class Execution:
    """The command of one run: its device, and what became of it. Closes what it opens."""

    def __init__(
        self, command: str, share: str | None, streams: tuple[int, int, int] = (0, 1, 2)
    ) -> None:
        """`streams` are input, output and errors. Raises UsageError for a command that is too
        long, and a folder that can't be carried."""
        text = os.fsencode(command)
        if not text.strip():
            raise UsageError("--exec: the command is empty; write --exec 'uname -a'")
        if len(text) > MOST_COMMAND or b"\0" in text:
            raise UsageError(f"--exec: a command has at most {MOST_COMMAND} bytes, and no NUL")
        self.shared: _Shared | None = None
        self._ended: tuple[int, int, int, int] | None = None
        self._acknowledged = False
        self._failure: str | None = None
        self._stop: Callable[[Outcome], None] = _ignore
        with contextlib.ExitStack() as stack:
            source, output, errors = (
                _Fd(source=streams[0]),
                _Fd(target=streams[1]),
                _Fd(target=streams[2]),
            )
            for backend in (source, output, errors):
                stack.callback(backend.close)
            self._outputs = [output, errors]
            ports = [
                Port(source, "pyvmm.input"),
                Port(output, "pyvmm.output"),
                Port(errors, "pyvmm.errors"),
            ]
            if share is not None:
                ports += self._open_share(share, stack)
            self._command = _Command(text, self._heard)
            # The last one to be introduced to the guest: when it speaks, the others are connected.
            ports.append(Port(self._command, "pyvmm.command"))
            for backend in self._outputs:
                backend.progressed = self._look
            output.broken = errors.broken = self._nobody_reads
            self.device = VirtioConsole(ports)
            self._command.wake = lambda: self.device.wake_input(len(ports) - 1)
            self._cleanup = stack.pop_all()

    def _open_share(self, text: str, stack: contextlib.ExitStack) -> list[Port]:
        share = parse_share(text)
        outgoing, archive = (stack.enter_context(_scratch_file()) for _ in range(2))
        self.shared = _Shared(share, archive)
        pack(share, outgoing)
        outgoing.flush()
        outgoing.seek(0)
        # tar pads each file to 512 bytes, and has as much in front of it.
        limit = share.limit + share.limit // 4 + (1 << 20)
        into, back = _Fd(source=outgoing.fileno()), _Bounded(archive.fileno(), limit)
        stack.callback(into.close)
        stack.callback(back.close)
        self._outputs.append(back)
        return [Port(into, "pyvmm.share-in"), Port(back, "pyvmm.share-out")]

    def close(self) -> None:
        """Any number of times."""
        self._cleanup.close()

    def make_console(self, on_quit: Callable[[], None]) -> Console:
        """The serial line's, which is nobody's here: only its end is kept."""
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._cleanup.callback(os.close, nowhere)
        return Console(on_quit, nowhere, nowhere)

    def tell_console(self, outcome: Outcome, tail: bytes) -> None:
        """Show the console's last lines where there is no status to pass on: they say why."""
        if outcome.command_status is None and outcome.exit_status and self._failure is None:
            for line in tail.decode("utf-8", "replace").splitlines()[-_LAST_LINES:]:
                tell(f"console: {line[:200]}")

    def connect(self, stop: Callable[[Outcome], None]) -> None:
        """`stop` ends the machine."""
        self._stop = stop

    def signal(self, number: int) -> bool:
        """Send the command a signal; it is up to the command what it makes of it."""
        self._command.say(b"signal %d" % number)
        return True

    def outcome(self, outcome: Outcome) -> Outcome:
        """How the run ended, with what is known of the command."""
        if self._failure is not None:
            return Outcome(FAILED, self._failure)
        if self._ended is not None and self._acknowledged:
            return outcome._replace(command_status=self._ended[0])
        if outcome.command_status is None and outcome.exit_status == 0:
            return Outcome(FAILED, f"the guest ended before the command did ({outcome.exit})")
        return outcome

    def take_share(self) -> None:
        """Bring the folder back, once the command has ended. Raises OutputError."""
        if self.shared is None or not self._acknowledged:
            return
        if any(isinstance(b, _Bounded) and b.exceeded for b in self._outputs):
            tell(
                f"--share {self.shared.share.folder}: the guest's files are larger than the limit, "
                "and none is brought back; add size=SIZE"
            )
            return
        (self.shared.through or self.shared.take_back)()

    # -- on the device loop's thread ------------------------------------------------------------

    def _heard(self, line: bytes) -> None:
        word, _, rest = line.partition(b" ")
        if word == b"failed":
            self._failure = one_line(rest[:200].decode("utf-8", "replace"))
            self._stop(Outcome(FAILED, self._failure))
        numbers = rest.split()
        if word != b"ended" or len(numbers) != 4 or self._ended is not None:
            return
        if all(n.isdigit() and len(n) < 16 for n in numbers):
            status, output, errors, share = map(int, numbers)
            self._ended = (status & 0xFF, output, errors, share)
            self._look()

    def _look(self) -> None:
        """Once all that the command wrote is out, the guest may power off."""
        if self._ended is None or self._acknowledged:
            return
        for backend, count in zip(self._outputs, self._ended[1:], strict=False):
            if backend.taken < count:
                return
        self._acknowledged = True
        self._command.say(b"taken")

    def _nobody_reads(self) -> None:
        self._stop(Outcome(STOPPED, "nobody reads the command's output", _BROKEN_PIPE))


def _scratch_file() -> IO[bytes]:
    """One without a name."""
    return tempfile.TemporaryFile(prefix="pyvmm-share-")


def _copy(fd: int) -> int:
    """Another number for it, which is waited for apart; /dev/null where it is closed."""
    try:
        return os.dup(fd)
    except OSError:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def _is_ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(0))
