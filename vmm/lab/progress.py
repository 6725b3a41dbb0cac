"""What the lab tells the user while it downloads, builds and boots: one line, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO


class Progress(Protocol):
    """Told of each step as it begins; the step ends when the next one begins, or with done().

    A long step tells with part() how far it is.
    """

    def step(self, text: str) -> None: ...

    def part(self, text: str) -> None: ...

    def done(self) -> None: ...


class Silent:
    """For tests and for callers with a display of their own."""

    def step(self, text: str) -> None:
        del text

    def part(self, text: str) -> None:
        del text

    def done(self) -> None:
        return


class Reporter:
    """A line that is rewritten on a terminal; elsewhere one plain line per step."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._rewrites = self._stream.isatty()
        self._open = False
        self._step = ""

    def step(self, text: str) -> None:
        self._step = text
        if self._rewrites:
            self._rewrite(f"{text} ...")
        else:
            self._stream.write(f"lab: {text}\n")
            self._stream.flush()

    def part(self, text: str) -> None:
        """Shown behind the step on a terminal only: a log needs the steps, not their parts."""
        if self._rewrites:
            self._rewrite(f"{self._step} ({text}) ...")

    def _rewrite(self, line: str) -> None:
        self._stream.write(f"\r\x1b[Klab: {line}")
        self._stream.flush()
        self._open = True

    def done(self) -> None:
        """Leaves the terminal's line empty: from here on it belongs to the guest."""
        if self._open:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._open = False


@contextmanager
def finished(progress: Progress) -> Iterator[Progress]:
    """The line is cleared however the work ends, so that an error starts at its beginning."""
    try:
        yield progress
    finally:
        progress.done()
