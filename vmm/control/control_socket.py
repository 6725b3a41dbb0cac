"""`--control PATH`: a Unix socket on which a running machine can be asked and told things.

Each line is a JSON object with a `command`, and gets one line back: `{"ok": true, ...}`, or
`{"ok": false, "error": "..."}`. After `follow` there come events, too, a line each. Clients are
not trusted: what they send can at worst have themselves cut off, and one that reads slowly loses
events.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence

from vmm.control.accepting import Accepting
from vmm.control.operations import REST_SECONDS, Operations
from vmm.conversion.events import (
    CAPACITY,
    EventFeed,
    MachineEvent,
    Requested,
    Subscription,
    as_json,
)
from vmm.core.errors import PyvmmError
from vmm.core.event_loop import EventLoop, drain
from vmm.core.events import FROM_HOST, Kind
from vmm.core.lean_typing import Any
from vmm.core.ranges import PAGE_SIZE
from vmm.core.unix_listener import UnixListener

COMMANDS = (
    "status", "pause", "resume", "dump-state", "convert", "devices", "restart-device", "dump",
    "snapshot", "follow", "quit",
)  # fmt: skip
MOST_FILES = 2
"""How many open files come along with a command."""
LONGEST_LINE = 64 << 10
MOST_CLIENTS = 16
_CHUNK = 64 << 10
ROWS_AT_ONCE = 512
"""How much of a long answer is made at once: a guest can have its page states make one of tens of
thousands of rows, and the device loop, which makes it, has to go on."""
EVENTS_AT_ONCE = 256

_WHY = {
    errno.EACCES: "a policy refused it",
    errno.EPERM: "a policy refused it",
    errno.EAGAIN: "a policy put it off, or carried out a part of it",
    errno.EBUSY: "another conversion or a device's access to these pages was under way, or a "
    "policy took its time; try again",
    errno.EINVAL: "not all of it is guest RAM; dump-state lists what is",
    errno.ENOSPC: "it would leave the guest's memory in too many pieces",
    errno.EOPNOTSUPP: "this machine has no private memory; start it with --private-mem",
}
"""What a conversion's answer mostly means, where no policy's word is known."""


class BadRequest(Exception):
    """A request that can't be carried out; the text says why."""


class ControlSocket:
    """Listens from the start; answers between `serve` and `close`, on the loop's thread."""

    def __init__(self, path: str) -> None:
        """Raises UsageError when nothing can listen at `path`."""
        self._listener = UnixListener("--control ", path, owner_only=True)
        self._clients: set[_Client] = set()
        self._loop: EventLoop | None = None
        # Rung on any thread when there are events for somebody.
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def serve(self, loop: EventLoop, operations: Operations) -> None:
        self._loop = loop
        self._operations = operations
        loop.add(self._bell, self._on_events, unheld=True)
        self._accepting = Accepting(loop, self._listener, self._take)

    def _take(self, connection: socket.socket) -> None:
        assert self._loop is not None
        client = _Client(connection, self._loop, self._answer, self._clients.discard, self._ring)
        if len(self._clients) >= MOST_CLIENTS:
            for other in list(self._clients):
                other.leave_if_gone()
        if len(self._clients) >= MOST_CLIENTS:
            client.say({"ok": False, "error": f"{MOST_CLIENTS} clients are connected already"})
            client.close()
            return
        self._clients.add(client)
        try:
            client.listen()
        except OSError:  # epoll has no room for it: that costs the caller, not the run
            client.close()

    def _answer(self, client: _Client, line: bytes) -> dict[str, Any]:
        try:
            return {"ok": True, **self._carry_out(client, _parsed(line))}
        except BadRequest as refusal:
            return {"ok": False, "error": str(refusal)}

    def _carry_out(self, client: _Client, request: dict[str, Any]) -> dict[str, Any]:
        operations = self._operations
        match request.get("command"):
            case "status":
                return operations.status()._asdict()
            case "dump-state":
                return operations.dump_state()
            case "pause":
                if not operations.pause():
                    raise BadRequest(
                        f"a device does not come to rest within {REST_SECONDS:g} s (a disk may "
                        "hang); the guest runs on, try again"
                    )
            case "resume":
                operations.resume()
            case "convert":
                _convert(operations, request)
            case "devices":
                return {"devices": operations.devices()}
            case "restart-device":
                _restart(operations, request)
            case "dump":
                private = request.get("private") is True
                return _saved(lambda: operations.dump(client.files(1)[0], private=private))
            case "snapshot":
                count = 2 if request.get("private") is True else 1
                return _saved(lambda: operations.snapshot(*client.files(count)))
            case "follow":
                client.follow(_feed(operations).subscribe(self._ring))
            case "quit":
                operations.quit()
            case other:
                raise BadRequest(f"command {other!r:.40} is unknown; use {', '.join(COMMANDS)}")
        return {}

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def _on_events(self) -> None:
        drain(self._bell)
        for client in list(self._clients):
            client.look_for_events()

    def close(self) -> None:
        """Hang up on everybody and remove the socket's file; any number of times."""
        for client in list(self._clients):
            for _ in range(CAPACITY // EVENTS_AT_ONCE + 1):
                client.look_for_events()  # to how the run ended
            client.close()
        if self._loop is not None:
            self._accepting.stop()
            self._loop.remove(self._bell)
            self._loop = None
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
        self._listener.close()


class _Client:
    """One connection. Nothing is read from it while it has not taken its last answers."""

    def __init__(
        self,
        connection: socket.socket,
        loop: EventLoop,
        answer: Callable[[_Client, bytes], dict[str, Any]],
        gone: Callable[[_Client], None],
        ring: Callable[[], None],
    ) -> None:
        """`ring` has `look_for_events` called soon."""
        self._ring = ring
        self._connection = connection
        self._loop = loop
        self._answer = answer
        self._gone = gone
        self._input = b""
        self._output = b""  # never empty while there are pieces left
        self._pieces: Iterator[bytes] = iter(())
        self._ends = False
        self._events: Subscription | None = None
        self._files: list[int] = []

    def listen(self) -> None:
        self._loop.watch(self._connection.fileno(), self._ready, readable=True, unheld=True)

    def _ready(self) -> None:
        try:
            if self._output:
                self._send()
            else:
                self._receive()
            self._go_on()
        except BlockingIOError:
            return
        except OSError:  # it has hung up
            self.close()

    def _receive(self) -> None:
        flags = socket.MSG_CMSG_CLOEXEC
        data, files, _, _ = socket.recv_fds(self._connection, _CHUNK, MOST_FILES, flags)
        if files:
            self._close_files()
            self._files = files
        self._input += data
        if not data:
            if self._events is not None and _has_hung_up(self._connection):
                raise ConnectionResetError
            self._ends = True
            if self._input:  # a last line without its end
                self._input += b"\n"

    def _go_on(self) -> None:
        """Answer what has come whole, as long as the answers are taken."""
        while not self._output and b"\n" in self._input[: LONGEST_LINE + 1]:
            line, _, self._input = self._input.partition(b"\n")
            self.say(self._answer(self, line))
        if not self._output and len(self._input) > LONGEST_LINE:
            self.say({"ok": False, "error": f"a line is at most {LONGEST_LINE} bytes long"})
            self._input, self._ends = b"", True
        if not self._output and self._events is not None:
            self._say_events(self._events)
        if self._ends and not self._output and not self._input and self._events is None:
            self.close()
        elif self._connection.fileno() >= 0:
            more = bool(self._output)
            # One that follows may say that it won't say any more.
            self._loop.watch(
                self._connection.fileno(),
                self._ready,
                readable=not more and not self._ends,
                writable=more,
                unheld=True,
            )

    def files(self, count: int) -> list[int]:
        """The open files that came along last: exactly so many; they stay this client's."""
        if len(self._files) != count:
            raise BadRequest(
                f"{len(self._files)} open files came along (SCM_RIGHTS), and {count} are written "
                "to; use pyvmm ctl"
            )
        return self._files

    def _close_files(self) -> None:
        for fd in self._files:
            os.close(fd)
        self._files = []

    def follow(self, events: Subscription) -> None:
        """Send events from now on, whenever there is nothing else to say."""
        if self._events is not None:
            self._events.close()
        self._events = events

    def look_for_events(self) -> None:
        """There may be some; any number of times."""
        if self._events is None or self._output:
            return  # it is told those when it has taken the last ones
        try:
            self._go_on()
        except OSError:  # it has hung up
            self.close()

    def leave_if_gone(self) -> None:
        """Close where the other end has hung up: of one that follows and has said that it won't
        say any more, only the next event would show it."""
        if _has_hung_up(self._connection):
            self.close()

    def _say_events(self, events: Subscription) -> None:
        """Some of them: the others on the loop have their turn before the rest."""
        some = events.take(EVENTS_AT_ONCE)
        if some:
            self._output = b"".join(json.dumps(as_json(one)).encode() + b"\n" for one in some)
            with contextlib.suppress(BlockingIOError):
                self._send()  # OSError: it has hung up, which one that doesn't speak shows here
            self._ring()

    def say(self, answer: dict[str, Any]) -> None:
        self._pieces = encoded(answer)
        self._output = next(self._pieces)
        self._send_what_fits()

    def _send_what_fits(self) -> None:
        with contextlib.suppress(OSError):  # a client that has hung up is noticed on reading
            self._send()

    def _send(self) -> None:
        """Send some, and make the next piece when all that there was is on its way."""
        self._output = self._output[self._connection.send(self._output) :]
        if not self._output:
            self._output = next(self._pieces, b"")

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
        self._close_files()
        if self._connection.fileno() >= 0:
            self._loop.remove(self._connection.fileno())
            self._connection.close()
        self._gone(self)


def _has_hung_up(connection: socket.socket) -> bool:
    """Whether it neither speaks nor listens any more: shutdown(SHUT_WR) says the first alone."""
    waiter = select.poll()
    waiter.register(connection, 0)
    return bool(waiter.poll(0))


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
    following = None if operations.events is None else operations.events.subscribe()
    answer = operations.convert(kind, gpa, size)
    events = [] if following is None else following.take()
    if following is not None:
        following.close()
    if answer:
        name = errno.errorcode.get(-answer, str(-answer))
        why = _why(-answer, events)
        raise BadRequest(f"{kind.value} [{gpa:#x}, {gpa + size:#x}): {name}, {why}")


def _restart(operations: Operations, request: dict[str, Any]) -> None:
    name = request.get("device")
    if not isinstance(name, str):
        raise BadRequest('restart-device needs "device": a name, which devices lists')
    try:
        operations.restart_device(name)
    except LookupError as error:
        raise BadRequest(str(error.args[0])) from None
    except PyvmmError as error:
        raise BadRequest(str(error)) from None


def _why(number: int, events: Sequence[MachineEvent]) -> str:
    """Why a conversion of the host's got this answer, as `events` of its time have it."""
    for event in events:
        if isinstance(event, Requested) and event.doorbell == FROM_HOST and event.decision:
            if event.decision == "allow":
                break
            said = {"deny": "refused it", "partial": "allowed a part of it"}
            verb = said.get(event.decision, f"said {event.decision}")
            return f"policy {event.decided_by or 'of this run'} {verb}"
    return _WHY.get(number, os.strerror(number))


def _saved(save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `save` says, or why it can't."""
    from vmm.core.errors import HostError, UsageError, in_words  # most runs are not asked

    try:
        return save()
    except (UsageError, HostError) as error:
        raise BadRequest(str(error)) from None
    except TimeoutError:
        raise BadRequest("a device does not come to rest (a disk may hang); try again") from None
    except OSError as error:
        raise BadRequest(f"it could not be written: {in_words(error)}") from None


def _feed(operations: Operations) -> EventFeed:
    if operations.events is None:
        raise BadRequest("this machine has no events to follow")
    return operations.events


def _number(request: dict[str, Any], name: str) -> int:
    """An address or a size: a JSON number, or text as in "0x1000"."""
    value = request.get(name)
    with contextlib.suppress(ValueError):
        number = int(value, 0) if isinstance(value, str) else value
        if type(number) is int and 0 <= number < 1 << 64:
            return number
    raise BadRequest(f'convert needs "{name}": a number of bytes, or text as in "0x1000"')
