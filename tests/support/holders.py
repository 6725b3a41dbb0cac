"""What is told of holders in this process, without the pipes that it had before the test.

pytest's own output may go to a pipe, and there bytes wait while its reader is slow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress


def _pipes() -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor that lists them
            if os.readlink(f"/proc/self/fd/{number}").startswith("pipe:"):
                yield number


def pipes_of_the_test() -> Callable[[Iterable[str]], list[str]]:
    """Of words about holders, those about this process and no pipe that is open now."""
    older = {f"the pipe of fd {number}" for number in _pipes()}
    process = f"process {os.getpid()} "

    def about_us(words: Iterable[str]) -> list[str]:
        return [
            word
            for word in words
            if process in word and not any(word.endswith(pipe) for pipe in older)
        ]

    return about_us
