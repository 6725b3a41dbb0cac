"""The command without what a start of it costs: a process that has imported it and forks for each.

What the forked process does is what `python -m vmm` does from there on. Modules that an earlier one
has imported are there already, which is what most of a start's time goes to.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

_STANDARD = (0, 1, 2)


class Forked:
    """A process, as far as subprocess.Popen is used here."""

    def __init__(self, link: socket.socket, pid: int, streams: Sequence[IO[bytes]]) -> None:
        self.stdin, self.stdout, self.stderr = streams
        self.returncode: int | None = None
        self._link = link
        self._pid = pid

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                status = int(self._link.recv(16, socket.MSG_DONTWAIT))
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        selector = selectors.DefaultSelector()
        selector.register(self._link, selectors.EVENT_READ)
        while self.poll() is None:
            selector.select()
        selector.close()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def communicate(self) -> tuple[bytes, bytes]:
        """Nothing more to its input; the rest of what it says, when it has ended."""
        self.stdin.close()
        said = {self.stdout: b"", self.stderr: b""}
        with selectors.DefaultSelector() as selector:
            for stream in said:
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    piece = os.read(key.fd, 1 << 16)
                    said[key.fileobj] += piece  # type: ignore[index]
                    if not piece:
                        selector.unregister(key.fileobj)
        self.wait()
        for stream in said:
            stream.close()
        return said[self.stdout], said[self.stderr]


class Warm:
    """The process that forks; `start` one command after the other."""

    def __init__(self, preloaded: str, folder: str) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.injection.warm", str(theirs.fileno())], cwd=folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            env=os.environ | {"LD_PRELOAD": preloaded},
        )  # fmt: skip
        theirs.close()

    def start(self, words: Sequence[str], environment: dict[str, str]) -> Forked:
        """`words` are the command's own."""
        pipes = [os.pipe() for _ in _STANDARD]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        ours = [pipes[0][1], pipes[1][0], pipes[2][0]]
        asked = json.dumps({"words": list(words), "environment": environment}).encode()
        socket.send_fds(self._link, [asked], theirs)
        for fd in theirs:
            os.close(fd)
        pid = int(self._link.recv(16))
        modes = ("wb", "rb", "rb")
        streams = [os.fdopen(fd, mode, 0) for fd, mode in zip(ours, modes, strict=True)]
        return Forked(self._link, pid, streams)

    def close(self) -> None:
        self._link.close()
        self._process.wait()


_ARMED = ctypes.c_int()


def _serve(link: socket.socket) -> None:
    """Fork for each question. Returns in the forked process, with the command's words in place."""
    while True:
        asked, fds, _, _ = socket.recv_fds(link, 1 << 16, len(_STANDARD))
        if not asked:
            sys.exit()
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            _become(json.loads(asked), fds)
            link.close()
            atexit.register(_name_modules, writer)
            return
        os.close(writer)
        for fd in fds:
            os.close(fd)
        link.send(b"%d" % pid)
        with open(reader, "rb") as imported:
            names = imported.read().decode().split()
        _, status = os.waitpid(pid, 0)
        link.send(b"%d" % status)
        for name in names:
            if name not in sys.modules:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)


def _name_modules(fd: int) -> None:
    _ARMED.value = 0  # this write is no call of the command's
    os.write(fd, " ".join(sys.modules).encode())


def _become(asked: dict[str, object], fds: Sequence[int]) -> None:
    for target, fd in zip(_STANDARD, fds, strict=True):
        os.dup2(fd, target)
        os.close(fd)
    environment, words = asked["environment"], asked["words"]
    assert isinstance(environment, dict) and isinstance(words, list)
    os.environ.update(environment)
    ctypes.CDLL(None).pyvmm_shim_start()
    sys.argv = ["pyvmm", *words]


if __name__ == "__main__":
    _ARMED = ctypes.c_int.in_dll(ctypes.CDLL(None), "pyvmm_shim_armed")
    _serve(socket.socket(fileno=int(sys.argv[1])))
    # As which it has a sandbox, as `python -m vmm` has.
    sys.modules["__main__"] = importlib.import_module("vmm.__main__")
    from vmm.cli.main import entry_point

    entry_point()
