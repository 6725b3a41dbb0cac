"""What signals mean to a running machine: end, power button, stop and continue of the process.

A handler runs in the middle of anything on the main thread, also of code that holds a lock. So
handlers only note what happened, and the device loop acts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from vmm.core.ending_signals import ENDING_SIGNALS, on_ending_signal
from vmm.core.event_loop import EventLoop, drain
from vmm.core.job_control import on_stop_and_continue
from vmm.core.lean_signal import signal

POWER_BUTTON_SECONDS = 30.0
"""How long a guest that was told of its power button may take to power off."""


class SignalReactions:
    """SIGTERM presses the power button, and ends the run when that is no use: nobody listens, the
    guest takes too long, or the signal comes again. The other ending signals end it at once.
    SIGTSTP gives the terminal back before the process stops, SIGCONT takes it again.

    `end(reason)` and `suspend()` are called from handlers; `press_power_button()`, which says
    whether the guest listens, and `continued()` on the loop's thread. While `is_stuck()` the loop
    may not come round to act, and SIGTERM ends the run too.
    """

    def __init__(
        self,
        loop: EventLoop,
        *,
        end: Callable[[str], None],
        press_power_button: Callable[[], bool],
        suspend: Callable[[], None],
        continued: Callable[[], None],
        is_stuck: Callable[[], bool],
    ) -> None:
        self._loop = loop
        self._end = end
        self._press_power_button = press_power_button
        self._suspend = suspend
        self._continued = continued
        self._is_stuck = is_stuck
        self._asked = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block signals have these meanings; main thread only."""
        with ExitStack() as stack:
            self._button = self._eventfd(stack, self._on_button)
            stack.enter_context(on_ending_signal(self._ending))
            go_on = self._eventfd(stack, self._continued)
            stack.enter_context(
                on_stop_and_continue(self._suspend, lambda: os.eventfd_write(go_on, 1))
            )
            yield

    def _eventfd(self, stack: ExitStack, callback: Callable[[], None]) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, fd)

        def signalled() -> None:
            drain(fd)
            callback()

        self._loop.add(fd, signalled, unheld=True)
        stack.callback(self._loop.remove, fd)
        return fd

    # -- handlers -----------------------------------------------------------------------------

    def _ending(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM and not self._asked and not self._is_stuck():
            self._asked = True
            os.eventfd_write(self._button, 1)
        else:
            self._end(f"received {ENDING_SIGNALS[number]}")

    # -- on the device loop -------------------------------------------------------------------

    def _on_button(self) -> None:
        if self._press_power_button():
            self._loop.set_timer(time.monotonic() + POWER_BUTTON_SECONDS, self._too_late)
        else:
            self._end("received SIGTERM")

    def _too_late(self) -> None:
        self._end(
            f"received SIGTERM, and the guest did not power off in {POWER_BUTTON_SECONDS:g} s"
        )
