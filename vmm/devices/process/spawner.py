"""What starts the devices' processes: a process that was forked before there was a guest.

pyvmm itself can't: it has threads, and once the guest runs its sandbox lets it fork no more. What
comes from here has none of the guest's memory, no KVM, and nothing of what was opened later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial

from vmm.core.errors import HostError
from vmm.core.lean_typing import NamedTuple, NoReturn, Protocol
from vmm.devices.process.back_end import BackEnd
from vmm.devices.process.dialing import Dialing, answered, asked
from vmm.devices.virtio.device import VirtioDevice

_START, _END = b"s", b"e"
_FAILED = b"!"
_ENDS_WITHIN = 2000
"""Milliseconds that a killed process may take: one that waits for a disk doesn't end before."""
_ANSWERS_WITHIN = 10.0
_MOST = 4096
_STILL_THERE = "was killed, and waits for the host still"

_IGNORED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGUSR1,
    signal.SIGUSR2, signal.SIGPIPE,
)  # fmt: skip
"""What a terminal or a process manager sends to all of a command's processes."""


class Job(NamedTuple):
    """A device that is to have a process."""

    device: VirtioDevice
    files: Sequence[int]
    """What pyvmm moves bytes from and to, by the numbers that both sides have for it."""
    keeps: Sequence[int]
    """The file descriptors that it needs: the device's own."""
    may_keep: Callable[[int], bool] = lambda features: False
    """As BackEnd's."""
    accepts: bool = False
    """Whether programs of the host call it."""
    dialing: Dialing | None = None
    """How it calls them; None: it doesn't."""


class Confine(Protocol):
    """Puts a device's process into its sandbox: `vmm.sandbox.device.enter_device`."""

    def __call__(self, *, accepts: bool, receives: bool) -> tuple[bool, int]:
        """`accepts`: it takes callers; `receives`: it is given sockets. What of the sandbox there
        is: system calls' filter, Landlock's version."""
        ...


class Spawner:
    """The process that starts processes, from `begin` until `close`."""

    def __init__(self, confine: Confine | None) -> None:
        """`confine`: None leaves devices' processes as they are."""
        self._confine = confine
        self._jobs: list[Job] = []
        self._pid = 0
        self._commands: socket.socket | None = None

    def add(self, job: Job) -> int:
        """A device's number; before `begin`."""
        self._jobs.append(job)
        return len(self._jobs) - 1

    def begin(self) -> None:
        """Fork. This process should have no threads yet. Raises HostError."""
        self._commands, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._pid = os.fork()
        except OSError as error:
            theirs.close()
            raise HostError(
                f"starting the process that starts devices' processes failed: {error.strerror}; "
                "free memory or processes"
            ) from error
        if self._pid == 0:
            _serve(theirs, self._jobs, self._confine)
        theirs.close()
        self._commands.settimeout(_ANSWERS_WITHIN)

    def start(self, number: int) -> tuple[socket.socket, int]:
        """The socket to a new process for that device, and its id. Raises HostError."""
        try:
            words, fds = self._ask(_START, number)
        except (OSError, EOFError):
            raise HostError("the process that starts devices' processes is gone") from None
        if words.startswith(_FAILED) or len(fds) != 1:
            raise HostError(
                f"a device's process can't be started: {words[1:].decode()}; free memory or "
                "processes, and try again"
            )
        return socket.socket(fileno=fds[0]), int(words)

    def end(self, number: int) -> str:
        """End that device's process, if it hasn't; how it ended, in words."""
        if self._commands is None:
            return "was not there"
        try:
            return self._ask(_END, number)[0].decode()
        except (OSError, EOFError):
            return "has ended"

    def _ask(self, what: bytes, number: int) -> tuple[bytes, list[int]]:
        assert self._commands is not None
        self._commands.send(what + bytes((number,)))
        words, fds, _, _ = socket.recv_fds(self._commands, _MOST, 1, socket.MSG_CMSG_CLOEXEC)
        if not words:
            raise EOFError
        return words, fds

    def close(self) -> None:
        """End all of them; any number of times."""
        if self._commands is not None:
            self._commands.close()
            self._commands = None
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)


class _Nursery:
    """The spawner's side."""

    def __init__(self, jobs: Sequence[Job], confine: Confine | None) -> None:
        self._jobs = jobs
        self._confine = confine
        self._children: dict[int, int] = {}
        self._dialing: dict[int, socket.socket] = {}
        """Where processes ask for connections, by the device's number."""

    def start(self, number: int) -> tuple[bytes, list[socket.socket]]:
        if number in self._children and self.end(number) == _STILL_THERE:
            return _FAILED + f"the last one {_STILL_THERE}".encode(), []
        with contextlib.ExitStack() as stays, contextlib.ExitStack() as goes:
            try:
                ours, theirs = _pair(stays, goes)
                answering, asking = _pair(stays, goes)
                pid = os.fork()
            except OSError as error:  # of this device alone: others go on
                return _FAILED + (error.strerror or "").encode(), []
            if pid == 0:
                _become(self._jobs[number], theirs, asking, self._confine)
            stays.pop_all()
        self._children[number] = pid
        if self._jobs[number].dialing is None:
            answering.close()
        else:
            self._dialing[number] = answering
        return str(pid).encode(), [ours]

    def wait(self, commands: socket.socket) -> None:
        """Until there is a command; make the connections meanwhile that processes ask for."""
        while True:
            poll = select.poll()
            poll.register(commands, select.POLLIN)
            for channel in self._dialing.values():
                poll.register(channel, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if commands.fileno() in ready:
                return
            for number, channel in list(self._dialing.items()):
                dialing = self._jobs[number].dialing
                assert dialing is not None
                if channel.fileno() in ready and not answered(channel, dialing.dial):
                    self._hang_up(number)

    def _hang_up(self, number: int) -> None:
        channel = self._dialing.pop(number, None)
        if channel is not None:
            channel.close()

    def end(self, number: int) -> str:
        pid = self._children.get(number)
        if pid is None:
            return "was not there"
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            found, status = _killed(pid)
        if not found:
            return _STILL_THERE
        del self._children[number]
        self._hang_up(number)
        code = os.waitstatus_to_exitcode(status)
        if code > 0:
            return f"could not enter its sandbox: {os.strerror(code)}"
        if code == 0:
            return "ended"
        return f"was killed by {signal.Signals(-code).name}"

    def end_all(self) -> None:
        for number in list(self._children):
            self.end(number)


def _pair(
    mine: contextlib.ExitStack, childs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return mine.enter_context(ours), childs.enter_context(theirs)


def _killed(pid: int) -> tuple[int, int]:
    """Kill it, and wait for its end a while: (0, 0) where it takes longer."""
    os.kill(pid, signal.SIGKILL)
    try:
        fd = os.pidfd_open(pid)
    except OSError:  # nothing to wait by
        return os.waitpid(pid, os.WNOHANG)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(_ENDS_WITHIN)
    finally:
        os.close(fd)
    return os.waitpid(pid, os.WNOHANG)


def _serve(
    commands: socket.socket,
    jobs: Sequence[Job],
    confine: Confine | None,
) -> NoReturn:
    """The process that starts processes. Never returns: its parent's stack must not run twice."""
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        _close_all_but({2, commands.fileno(), *(fd for job in jobs for fd in job.keeps)})
        nursery = _Nursery(jobs, confine)
        try:
            while True:
                nursery.wait(commands)
                command = commands.recv(_MOST)
                if not command:
                    break
                sockets: list[socket.socket] = []
                if command[:1] == _START:
                    words, sockets = nursery.start(command[1])
                else:
                    words = nursery.end(command[1]).encode()
                socket.send_fds(commands, [words], [one.fileno() for one in sockets])
                for one in sockets:
                    one.close()
        except OSError:
            pass
        nursery.end_all()
    finally:
        os._exit(0)


def _become(
    job: Job, connection: socket.socket, asking: socket.socket, confine: Confine | None
) -> NoReturn:
    """A device's process, with nothing open but its socket and what the device needs."""
    try:
        kept = {connection.fileno(), *job.keeps}
        if job.dialing is not None:
            kept.add(asking.fileno())
            job.dialing.dial_by(partial(asked, asking))
        _close_all_but(kept)
        sys.stdout = sys.stderr = None  # their numbers may be a caller's soon
        import vmm.devices.virtio.read_ahead  # noqa: F401 -- what it would load later, and can't

        back_end = BackEnd(job.device, connection, job.files, job.may_keep)
        seccomp, landlock = False, 0
        if confine is not None:
            try:
                seccomp, landlock = confine(accepts=job.accepts, receives=job.dialing is not None)
            except OSError as error:
                os._exit(error.errno or errno.EPERM)
        back_end.run(seccomp, landlock)
    finally:
        os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    former = -1
    for fd in sorted(kept):
        os.closerange(former + 1, fd)
        former = fd
    os.closerange(former + 1, os.sysconf("SC_OPEN_MAX"))
