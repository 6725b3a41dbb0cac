"""A terminal that hands every byte to the guest for a while, and is given back as it was."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from types import TracebackType
from typing import Any, Self


class RawTerminal:
    """Raw between `enter` and `restore`, or the end of its `with` block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None

    @property
    def is_raw(self) -> bool:
        """Whether `enter` found a terminal that is not given back yet."""
        return self._saved is not None

    def enter(self) -> None:
        """Make the terminal raw, also when somebody has changed it since the last time; anything
        else is left as it is."""
        if os.isatty(self._fd):
            if self._saved is None:
                self._saved = termios.tcgetattr(self._fd)
            tty.setraw(self._fd, termios.TCSANOW)

    @property
    def is_ours(self) -> bool:
        """Whether this process may use it now: a job in the background is stopped if it tries."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True  # not the terminal that our jobs are controlled by

    def restore(self) -> None:
        """Give the terminal back as it was; any number of times."""
        if self._saved is not None:
            # At once: waiting for output to drain may take for ever.
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
            self._saved = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()
