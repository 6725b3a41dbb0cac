"""`--gdb PORT|PATH`: where a debugger connects, and the one that has.

On the device loop's thread. The client is not trusted with the loop's time: what it sends is
answered for some milliseconds at a time, and nothing is read while it doesn't take its answers.
"""

from __future__ import annotations

import contextlib
import socket
import time

from vmm.control.accepting import Accepting, Listener
from vmm.control.gdb.packets import INTERRUPT, LONGEST, Packet, Parser, TooLong, framed
from vmm.control.gdb.session import Session
from vmm.control.gdb.target import Stop, Target
from vmm.core.errors import UsageError
from vmm.core.event_loop import URGENT_SECONDS, EventLoop, drain
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.core.unix_listener import UnixListener

if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = LONGEST
MOST_RESENT = 16
"""How often in a row a packet may arrive damaged, on either side, before the client is left."""
LOOK_AGAIN_SECONDS, STILL_SECONDS = 0.002, 0.25
"""How often, and how long in all, vCPUs are waited for that are in a handler when all are to stand
still. After that the stop is told all the same: such a vCPU runs no guest code either."""


def port_of(where: str) -> int | None:
    """The TCP port that `where` names, None for a path. Raises UsageError for an impossible one."""
    if not where or "\0" in where:
        raise UsageError("--gdb needs a TCP port, as in 1234, or a path for a Unix socket")
    if not (where.isascii() and where.isdigit()):
        return None
    port = int(where[:6])
    if not 1 <= port <= 65535:
        raise UsageError(f"--gdb {where}: a TCP port is 1 to 65535")
    return port


class _TcpListener:
    """Listens on this machine's loopback address only."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen(4)
        except OSError as error:
            self._socket.close()
            raise UsageError(
                f"--gdb {port}: cannot listen on 127.0.0.1:{port}: {error.strerror}; give another "
                "port, or a path"
            ) from error
        self._socket.setblocking(False)
        self.fd = self._socket.fileno()

    def accept(self) -> socket.socket | None:
        try:
            caller, _ = self._socket.accept()
        except BlockingIOError:
            return None
        caller.setblocking(False)
        with contextlib.suppress(OSError):
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return caller

    def close(self) -> None:
        self._socket.close()


def listen(where: str) -> Listener:
    """Raises UsageError where nothing can listen there."""
    port = port_of(where)
    return UnixListener("--gdb ", where, owner_only=True) if port is None else _TcpListener(port)


class GdbServer:
    """Listens from the start; serves between `serve` and `close`."""

    def __init__(self, where: str) -> None:
        """Raises UsageError where nothing can listen."""
        self.where = where
        self._listener = listen(where)
        self._loop: EventLoop | None = None
        self._accepting: Accepting | None = None
        self._client: _Client | None = None

    def serve(self, loop: EventLoop, target: Target, quit: Callable[[], None]) -> None:
        """The guest, whose vCPUs are about to be started, stands still until a debugger has it go
        on. `quit` ends the run."""
        self._loop, self._target, self._quit = loop, target, quit
        target.freeze()
        loop.add(target.signal, self._caught, unheld=True)
        self._accepting = Accepting(loop, self._listener, self._take)

    def _take(self, connection: socket.socket) -> None:
        assert self._loop is not None
        if self._client is not None and self._client.has_begun:
            connection.close()  # one debugger at a time; there is no packet that would say so
            return
        if self._client is not None:
            self._client.drop()  # a connection that says nothing keeps nobody out
        self._client = _Client(connection, self._loop, self._target, self._quit, self._gone)

    def _gone(self) -> None:
        self._client = None

    def _caught(self) -> None:
        drain(self._target.signal)
        if self._client is not None:
            self._client.await_stillness()
        elif self._target.frozen and self._target.attached:
            self._target.let_go()  # caught while its debugger went away

    def close(self, exit_status: int) -> None:
        """The guest has ended: tell the debugger, hang up, and remove the socket's file; any
        number of times."""
        if self._client is not None:
            self._client.say_ended(exit_status)
            self._client.drop()
        if self._loop is not None and self._accepting is not None:
            self._loop.remove(self._target.signal)
            self._accepting.stop()
            self._loop = None
        self._listener.close()


class _Client:
    """One connection."""

    def __init__(
        self,
        connection: socket.socket,
        loop: EventLoop,
        target: Target,
        quit: Callable[[], None],
        gone: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._loop = loop
        self._target = target
        self._gone = gone
        self._parser = Parser()
        self._session = Session(target, quit)
        self._output = b""
        self._last = b""
        self._damaged = 0
        self._deadline: float | None = None
        """Until when stillness is waited for; None: nobody waits for it."""
        self._interrupting = False
        self.has_begun = False
        """Whether it has sent anything that makes sense."""
        loop.watch(connection.fileno(), self._ready, readable=True, unheld=True)

    # -- bytes --------------------------------------------------------------------------------

    def _ready(self) -> None:
        try:
            if self._output:
                self._send()
            else:
                data = self._connection.recv(_CHUNK)
                if not data:
                    self._hang_up()
                    return
                self._parser.feed(data)
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()
            return
        self._go_on()

    def _go_on(self) -> None:
        """Answer what has come whole, as long as answers are taken, for a while."""
        if self._connection.fileno() < 0:
            return
        until = time.monotonic() + URGENT_SECONDS
        try:
            for each in self._parser.take():
                self._take(each)
                if self._connection.fileno() < 0:
                    return
                if self._output or self._deadline is not None:
                    break
                if time.monotonic() >= until:
                    self._loop.set_timer(until, self._go_on)
                    break
        except TooLong as error:
            self._put(framed(b"E." + str(error).encode()))
            self._hang_up()
            return
        self._watch()

    def _watch(self) -> None:
        if self._connection.fileno() >= 0:
            # While packets wait here, their answers come first: what is kept stays bounded.
            full = self._parser.waiting > LONGEST + 4
            self._loop.watch(
                self._connection.fileno(),
                self._ready,
                readable=not self._output and not full,
                writable=bool(self._output),
            )

    def _put(self, data: bytes) -> None:
        self._output += data
        with contextlib.suppress(OSError):  # a client that has hung up is noticed on reading
            self._send()

    def _send(self) -> None:
        self._output = self._output[self._connection.send(self._output) :]

    # -- packets ------------------------------------------------------------------------------

    def _take(self, each: Packet | bytes) -> None:
        if each == INTERRUPT:
            self._begin()
            self._interrupt()
        elif isinstance(each, bytes):
            if each == b"-":
                self._resend()
            else:
                self._damaged = 0
        elif not each.intact:
            self._complain()
        else:
            self._begin()
            self._answer(each.data)

    def _begin(self) -> None:
        """The first thing that makes sense from a client attaches it: a stray connection doesn't
        stop the guest."""
        if not self.has_begun:
            self.has_begun = True
            self._target.attached += 1
            self._target.freeze()
            self._target.still()  # at least, no vCPU is in the guest

    def _answer(self, data: bytes) -> None:
        if not self._session.no_acks:
            self._put(b"+")
        reply = self._session.answer(data)
        if reply is not None:
            self._reply(reply)
        if self._session.detached:
            self._hang_up()

    def _reply(self, data: bytes) -> None:
        self._last = framed(data)
        self._put(self._last)

    def _complain(self) -> None:
        self._damaged += 1
        if self._damaged > MOST_RESENT:
            self._hang_up()
        elif self._session.no_acks:
            self._reply(b"E.a packet's checksum is wrong")
        else:
            self._put(b"-")

    def _resend(self) -> None:
        self._damaged += 1
        if self._damaged > MOST_RESENT:
            self._hang_up()
        elif self._last:
            self._put(self._last)

    # -- stops --------------------------------------------------------------------------------

    def _interrupt(self) -> None:
        if self._session.running:
            self._interrupting = True
            self._target.freeze()
            self.await_stillness()

    def await_stillness(self) -> None:
        """All vCPUs are to stand still: tell the debugger once they do."""
        if self._deadline is None:
            self._deadline = time.monotonic() + STILL_SECONDS
        self._look()

    def _look(self) -> None:
        if self._deadline is None or self._connection.fileno() < 0:
            return
        now = time.monotonic()
        if not self._target.still() and now < self._deadline:
            self._loop.set_timer(now + LOOK_AGAIN_SECONDS, self._look)
            return
        self._deadline = None
        if self._session.running:  # else what was caught is for later
            stop = self._target.next_stop()
            if stop is None and self._interrupting:
                stop = Stop(0, "interrupt")
            if stop is None:
                self._target.go_on()  # it was for a breakpoint that is no more
            else:
                self._interrupting = False
                self._reply(self._session.stopped(stop))
        self._go_on()

    def say_ended(self, exit_status: int) -> None:
        if self._session.running and not self._session.detached:
            self._reply(b"W%02x" % exit_status)

    def _hang_up(self) -> None:
        """The client has gone, or is left: the guest goes on, unless it has never started."""
        detached = self._session.detached
        self.drop()
        if self.has_begun and not detached:
            self._target.let_go()

    def drop(self) -> None:
        if self._connection.fileno() >= 0:
            self._loop.remove(self._connection.fileno())
            self._connection.close()
            self._gone()


def told_where(where: str) -> str:
    """What to type into gdb."""
    return f"target remote {where}" if port_of(where) is None else f"target remote :{where}"
