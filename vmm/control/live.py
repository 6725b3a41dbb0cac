"""A running machine from outside: status line, SIGUSR1, control socket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from vmm.control.operations import Operations
from vmm.core.event_loop import EventLoop, drain
from vmm.core.lean_signal import signal
from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.control.control_socket import ControlSocket
    from vmm.control.status_line import StatusLine


@contextmanager
def live_view(
    loop: EventLoop,
    operations: Operations,
    status_line: StatusLine | None,
    control: ControlSocket | None,
    *,
    signals: bool = True,
) -> Iterator[None]:
    """Within the block whatever the user wanted of these works; with `signals`, which takes the
    main thread, SIGUSR1 too."""
    with ExitStack() as stack:
        if signals:
            _print_pages_on_signal(loop, operations, stack)
        if status_line is not None:
            status_line.start(loop, operations)
            stack.callback(status_line.close)
        if control is not None:
            control.serve(loop, operations)
            stack.callback(control.close)
        yield


def _print_pages_on_signal(loop: EventLoop, operations: Operations, stack: ExitStack) -> None:
    # The handler may interrupt anything, also code that holds the locks that the answer needs.
    asked = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, asked)

    def print_pages() -> None:
        from vmm.control.status_line import page_summary  # most runs do without

        drain(asked)
        # A terminal is raw while the guest has it.
        end = "\r\n" if os.isatty(2) else "\n"
        lines = page_summary(operations.status(), operations.pages(), operations.ram)
        with contextlib.suppress(OSError):
            os.write(2, "".join(f"pyvmm: {line}{end}" for line in lines).encode())

    loop.add(asked, print_pages, unheld=True)
    stack.callback(loop.remove, asked)
    former = signal.signal(signal.SIGUSR1, lambda *_: os.eventfd_write(asked, 1))
    stack.callback(signal.signal, signal.SIGUSR1, former)
