"""Where the serial line of a program's machine goes: to a function, a file, a pseudo-terminal."""

from __future__ import annotations

import os
from collections.abc import Callable

from vmm.control.console import Console
from vmm.core.lean_typing import Any, Protocol


class HasFileno(Protocol):
    """A file, a socket, a pipe of subprocess."""

    def fileno(self) -> int: ...


Sink = Callable[[bytes], object]
ConsoleTarget = Sink | HasFileno | int | str | None


class Line:
    """The machine's side of a serial line, opened before the machine is.

    `target`: a function, which gets what the guest prints as bytes, on a vCPU's thread; a file or
    its descriptor; "pty" for a new pseudo-terminal, whose `path` programs can open; None drops it.
    """

    def __init__(self, target: ConsoleTarget) -> None:
        self.path: str | None = None
        self._sink: Sink | None = None
        self._fds: list[int] = []
        self._keyboard: int | None = None
        if isinstance(target, str):
            if target != "pty":
                raise ValueError(f"console={target!r}: a function, a file, a descriptor or 'pty'")
            import tty  # other targets have no use for it

            ours, theirs = os.openpty()
            self._fds = [ours, theirs]  # theirs, too: with nobody there a line is hung up
            tty.setraw(theirs)
            self.path = os.ttyname(theirs)
            self._stdin = self._stdout = ours
            return
        self._stdin, self._keyboard = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._fds = [self._stdin, self._keyboard]
        if callable(target):
            self._sink = target
            self._stdout = self._null()
        elif target is None:
            self._stdout = self._null()
        else:
            self._stdout = target if isinstance(target, int) else target.fileno()

    def _null(self) -> int:
        fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._fds.append(fd)
        return fd

    def connect(self, on_quit: Callable[[], None]) -> Console:
        """The console of the machine that is being made."""
        if self._sink is None:
            return Console(on_quit, self._stdin, self._stdout)
        return _CallingConsole(self._sink, on_quit, self._stdin, self._stdout)

    def type(self, data: bytes) -> int:
        """Bytes of `data` that found room on the way to the guest. Raises ValueError for a
        pseudo-terminal, which is typed on through its path."""
        if self._keyboard is None:
            raise ValueError(f"the console is {self.path}: open that, and write to it")
        try:
            return os.write(self._keyboard, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close what was opened here; any number of times."""
        while self._fds:
            os.close(self._fds.pop())


class _CallingConsole(Console):
    """Hands the guest's output to a function."""

    def __init__(self, sink: Sink, *rest: Any) -> None:
        super().__init__(*rest)
        self._sink = sink

    def _write(self, data: bytes) -> None:
        self._sink(data)
