"""`--control PATH`: a Unix socket on which a running machine can be asked and told things.

Each line is a JSON object with a `command`, and gets one line back: `{"ok": true, ...}`, or
`{"ok": false, "error": "..."}`. Clients are not trusted: what they send can at worst have
themselves cut off.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator

from vmm.control.operations import Operations
from vmm.core.event_loop import EventLoop
from vmm.core.events import Kind
from vmm.core.lean_typing import Any
from vmm.core.ranges import PAGE_SIZE
from vmm.core.unix_listener import UnixListener

COMMANDS = ("status", "pause", "resume", "dump-state", "convert", "quit")
LONGEST_LINE = 64 << 10
MOST_CLIENTS = 16
_CHUNK = 64 << 10
ROWS_AT_ONCE = 512
"""How much of a long answer is made at once: a guest can have its page states make one of tens of
thousands of rows, and the device loop, which makes it, has to go on."""
_ACCEPT_AGAIN_SECONDS = 1.0


class BadRequest(Exception):
    """A request that can't be carried out; the text says why."""


class ControlSocket:
    """Listens from the start; answers between `serve` and `close`, on the loop's thread."""

    def __init__(self, path: str) -> None:
        """Raises UsageError when nothing can listen at `path`."""
        self._listener = UnixListener("--control ", path, owner_only=True)
        self._clients: set[_Client] = set()
        self._loop: EventLoop | None = None

    def serve(self, loop: EventLoop, operations: Operations) -> None:
        self._loop = loop
        self._operations = operations
        self._listen()

    def _listen(self) -> None:
        assert self._loop is not None
        self._loop.add(self._listener.fd, self._accept, unheld=True)

    def _accept(self) -> None:
        assert self._loop is not None
        try:
            connection = self._listener.accept()
        except OSError:  # no fd is free: trying at once would not help
            self._loop.remove(self._listener.fd)
            self._loop.set_timer(time.monotonic() + _ACCEPT_AGAIN_SECONDS, self._listen)
            return
        if connection is None:
            return
        client = _Client(connection, self._loop, self._answer, self._clients.discard)
        if len(self._clients) >= MOST_CLIENTS:
            client.say({"ok": False, "error": f"{MOST_CLIENTS} clients are connected already"})
            client.close()
            return
        self._clients.add(client)
        client.listen()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return {"ok": True, **self._carry_out(_parsed(line))}
        except BadRequest as refusal:
            return {"ok": False, "error": str(refusal)}

    def _carry_out(self, request: dict[str, Any]) -> dict[str, Any]:
        operations = self._operations
        match request.get("command"):
            case "status":
                return operations.status()._asdict()
            case "dump-state":
                return operations.dump_state()
            case "pause":
                if not operations.pause():
                    raise BadRequest("a device does not come to rest; the guest runs on")
            case "resume":
                operations.resume()
            case "convert":
                _convert(operations, request)
            case "quit":
                operations.quit()
            case other:
                raise BadRequest(f"command {other!r:.40} is unknown; use {', '.join(COMMANDS)}")
        return {}

    def close(self) -> None:
        """Hang up on everybody and remove the socket's file; any number of times."""
        for client in list(self._clients):
            client.close()
        if self._loop is not None:
            self._loop.remove(self._listener.fd)
            self._loop = None
        self._listener.close()


class _Client:
    """One connection. Nothing is read from it while it has not taken its last answers."""

    def __init__(
        self,
        connection: socket.socket,
        loop: EventLoop,
        answer: Callable[[bytes], dict[str, Any]],
        gone: Callable[[_Client], None],
    ) -> None:
        self._connection = connection
        self._loop = loop
        self._answer = answer
        self._gone = gone
        self._input = b""
        self._output = b""  # never empty while there are pieces left
        self._pieces: Iterator[bytes] = iter(())
        self._ends = False

    def listen(self) -> None:
        self._loop.watch(self._connection.fileno(), self._ready, readable=True, unheld=True)

    def _ready(self) -> None:
        try:
            if self._output:
                self._send()
            else:
                self._receive()
        except BlockingIOError:
            return
        except OSError:  # it has hung up
            self.close()
            return
        self._go_on()

    def _receive(self) -> None:
        data = self._connection.recv(_CHUNK)
        self._input += data
        if not data:
            self._ends = True
            if self._input:  # a last line without its end
                self._input += b"\n"

    def _go_on(self) -> None:
        """Answer what has come whole, as long as the answers are taken."""
        while not self._output and b"\n" in self._input[: LONGEST_LINE + 1]:
            line, _, self._input = self._input.partition(b"\n")
            self.say(self._answer(line))
        if not self._output and len(self._input) > LONGEST_LINE:
            self.say({"ok": False, "error": f"a line is at most {LONGEST_LINE} bytes long"})
            self._input, self._ends = b"", True
        if self._ends and not self._output and not self._input:
            self.close()
        elif self._connection.fileno() >= 0:
            more = bool(self._output)
            self._loop.watch(
                self._connection.fileno(), self._ready, readable=not more, writable=more
            )

    def say(self, answer: dict[str, Any]) -> None:
        self._pieces = encoded(answer)
        self._output = next(self._pieces)
        with contextlib.suppress(OSError):  # a client that has hung up is noticed on reading
            self._send()

    def _send(self) -> None:
        """Send some, and make the next piece when all that there was is on its way."""
        self._output = self._output[self._connection.send(self._output) :]
        if not self._output:
            self._output = next(self._pieces, b"")

    def close(self) -> None:
        if self._connection.fileno() >= 0:
            self._loop.remove(self._connection.fileno())
            self._connection.close()
        self._gone(self)


def encoded(answer: dict[str, Any]) -> Iterator[bytes]:
    """`answer` as a line of JSON, in pieces: lists in it, which may be iterators, ROWS_AT_ONCE at
    a time."""
    text = "{"
    for number, (key, value) in enumerate(answer.items()):
        text += f"{', ' if number else ''}{json.dumps(key)}: "
        if not isinstance(value, (list, Iterator)):
            text += json.dumps(value)
            continue
        rows, before = iter(value), "["
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            yield (text + before + json.dumps(some)[1:-1]).encode()
            text, before = "", ", "
        text += "]" if before != "[" else "[]"
    yield (text + "}\n").encode()


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not a line of JSON: {error}") from None
    if not isinstance(request, dict):
        raise BadRequest('not a JSON object; write {"command": "status"}')
    return request


def _convert(operations: Operations, request: dict[str, Any]) -> None:
    try:
        kind = Kind(request.get("kind"))
    except ValueError:
        raise BadRequest('convert needs "kind": "share" or "unshare"') from None
    gpa, size = (_number(request, name) for name in ("gpa", "size"))
    if size <= 0 or size % PAGE_SIZE or gpa % PAGE_SIZE:
        raise BadRequest(f"convert takes whole pages of {PAGE_SIZE} bytes")
    answer = operations.convert(kind, gpa, size)
    if answer:
        name = errno.errorcode.get(-answer, str(-answer))
        raise BadRequest(f"{kind.value} [{gpa:#x}, {gpa + size:#x}): {name}")


def _number(request: dict[str, Any], name: str) -> int:
    """An address or a size: a JSON number, or text as in "0x1000"."""
    value = request.get(name)
    with contextlib.suppress(ValueError):
        number = int(value, 0) if isinstance(value, str) else value
        if type(number) is int and 0 <= number < 1 << 64:
            return number
    raise BadRequest(f'convert needs "{name}": a number of bytes, or text as in "0x1000"')
