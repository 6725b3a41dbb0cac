"""A process that a shell's job control stops and continues: SIGTSTP and SIGCONT."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from vmm.core.lean_signal import signal


@contextmanager
def on_stop_and_continue(suspend: Callable[[], None], resume: Callable[[], None]) -> Iterator[None]:
    """Within the block, `suspend` before SIGTSTP stops the process, `resume` when it goes on,
    whatever stopped it; both in signal handlers. Main thread only."""

    def stop(number: int, frame: object) -> None:
        suspend()
        # Not SIGTSTP with its default: that does nothing to a process without a parent shell.
        os.kill(os.getpid(), signal.SIGSTOP)

    with ExitStack() as stack:
        for number, handler in (
            (signal.SIGTSTP, stop),
            (signal.SIGCONT, lambda number, frame: resume()),
        ):
            if signal.getsignal(number) is not signal.SIG_IGN:
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield
