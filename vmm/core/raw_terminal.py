"""A terminal that hands every byte to the guest for a while, and is given back as it was."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

from vmm.core.lean_typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType


class RawTerminal:
    """Raw between `enter` and `restore`, or the end of its `with` block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None
        self._wanted = False

    @property
    def is_raw(self) -> bool:
        """Whether `enter` found a terminal that is not given back yet."""
        return self._saved is not None

    def enter(self) -> None:
        """Make the terminal raw; anything else is left as it is."""
        if os.isatty(self._fd):
            import termios  # not where there is no terminal
            import tty

            self._wanted = True
            try:
                if self._saved is None:
                    self._saved = repeated(lambda: termios.tcgetattr(self._fd))
                repeated(lambda: tty.setraw(self._fd, termios.TCSANOW))
            except OSError:  # the terminal is gone
                self._saved = None

    def suspend(self) -> None:
        """The process is about to be stopped: give the terminal back until `resume`."""
        self._give_back()

    def resume(self) -> None:
        """The process goes on: make it raw again if it was, whatever was done to it meanwhile;
        not for a job in the background, which would be stopped for that."""
        if self._wanted and self._is_ours():
            self.enter()

    def _is_ours(self) -> bool:
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True  # not the terminal that our jobs are controlled by

    def restore(self) -> None:
        """Give the terminal back as it was; any number of times."""
        self._wanted = False
        self._give_back()

    def _give_back(self) -> None:
        if self._saved is not None:
            import termios

            saved, self._saved = self._saved, None
            # At once: waiting for output to drain may take for ever.
            with contextlib.suppress(OSError):  # the terminal is gone
                repeated(lambda: termios.tcsetattr(self._fd, termios.TCSANOW, saved))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def repeated(change: Callable[[], Any]) -> Any:
    """What `change` finds out about a terminal, or does to it, however often it is interrupted, as
    by the stop of a job in the background: Python's termios doesn't repeat its calls. Raises
    OSError, which its own error isn't."""
    import termios

    while True:
        try:
            return change()
        except termios.error as error:
            number, words = error.args
            if number != errno.EINTR:
                raise OSError(number, words) from None
