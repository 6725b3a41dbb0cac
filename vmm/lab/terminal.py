"""The host's terminal while the guest has it: raw, and restored however it ends."""

from __future__ import annotations

import os
import sys
import termios
import tty
from types import TracebackType
from typing import Any, Self


def interactive() -> bool:
    """Whether both ends of the console are a terminal."""
    try:
        return os.isatty(sys.stdin.fileno()) and os.isatty(sys.stdout.fileno())
    except (AttributeError, ValueError, OSError):
        return False  # closed, or replaced by something that is no file


def size() -> tuple[int, int]:
    """Rows and columns."""
    columns, rows = os.get_terminal_size(sys.stdout.fileno())
    return rows or 24, columns or 80


class RawTerminal:
    """Every byte goes to the guest between `enter` and the end of the `with` block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None

    def enter(self) -> None:
        if self._saved is None:
            self._saved = termios.tcgetattr(self._fd)
            tty.setraw(self._fd, termios.TCSANOW)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            self._saved = None
