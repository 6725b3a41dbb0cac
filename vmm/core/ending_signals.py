"""The signals by which a user or a system asks a program to end, and the handler that answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from vmm.core.lean_signal import signal

ENDING_SIGNALS: dict[int, str] = {
    signal.SIGINT: "SIGINT",
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "SIGHUP",
    signal.SIGQUIT: "SIGQUIT",
}
"""Their numbers, and what they are called."""


@contextmanager
def on_ending_signal(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block, `handler` gets what asks us to end; main thread only.

    What the caller's caller had ignored stays ignored: nohup does that.
    """
    previous = {
        number: signal.signal(number, handler)
        for number in ENDING_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)
