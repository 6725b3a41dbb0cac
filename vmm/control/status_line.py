"""`--status`: one line that is kept up to date, and never stands in the guest's console.

Where stderr is a terminal of its own the line is there. On the guest's terminal it is the
window's title: any line of the screen belongs to the guest. Elsewhere a line is added now and then.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

from vmm.control.operations import Operations, Status
from vmm.core.errors import UsageError
from vmm.core.event_loop import EventLoop
from vmm.core.ranges import Range, RangeMap
from vmm.memory.guest_memory import PageState

UPDATE_SECONDS = 1.0
LOG_SECONDS = 10.0
"""How often a line is added where it can't be updated."""

MAP_COLUMNS = 64
_MAP_SIGNS = {
    PageState.PRIVATE: ".",
    PageState.SHARED: "#",
    PageState.DEFERRED: "~",
    PageState.LENT: "=",
    PageState.OBSERVED: "?",
}

_UNTITLED = ("", "dumb", "linux")
_SAVE_TITLE, _RESTORE_TITLE = b"\x1b[22;2t", b"\x1b[23;2t"  # xterm's; others ignore it


def mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def status_line(now: Status, before: Status) -> str:
    """One line about `now`, with the rates since `before`."""
    seconds = max(now.seconds - before.seconds, 1e-9)
    deferred = f" + {mebibytes(now.deferred_bytes)} deferred" if now.deferred_bytes else ""
    if now.observed_bytes:
        states = [f"{mebibytes(now.observed_bytes)} of which the host is not told"]
        exits = f"{(now.exits - before.exits) / seconds:.0f} exits/s"
        return ", ".join(["paused"] * (now.state == "paused") + [*states, exits])
    words = [
        f"shared {mebibytes(now.shared_bytes)}",
        f"private {mebibytes(now.private_bytes)}{deferred}",
        f"{(now.conversions - before.conversions) / seconds:.0f} conversions/s",
        f"{now.refused} refused",
        f"{(now.exits - before.exits) / seconds:.0f} exits/s",
    ]
    return ", ".join(["paused", *words] if now.state == "paused" else words)


def page_map(
    states: RangeMap[PageState | None], ram: Sequence[Range], columns: int = MAP_COLUMNS
) -> str:
    """RAM from its first page to its last, equal parts of it as one sign each: `.` private,
    `#` shared, `~` deferred, `=` lent, `?` the host is not told, `+` several.

    A part's states are looked up together, however many runs the guest has made of it.
    """
    total = sum(area.size for area in ram)
    bounds = [total * column // columns for column in range(columns + 1)]
    signs = []
    for low, high in pairwise(bounds):
        seen = set()
        for area in _parts(ram, low, high):
            seen |= {_MAP_SIGNS.get(state, "+") for state in states.values(area) if state}
        signs.append(seen.pop() if len(seen) == 1 else "+" if seen else "")
    return "".join(signs)


def _parts(ram: Sequence[Range], low: int, high: int) -> Iterator[Range]:
    """The addresses of RAM's bytes from the `low`-th to the `high`-th."""
    for area in ram:
        start, end = max(low, 0), min(high, area.size)
        if start < end:
            yield Range(area.start + start, end - start)
        low, high = low - area.size, high - area.size


def page_summary(
    status: Status, pages: RangeMap[PageState | None], ram: Sequence[Range]
) -> list[str]:
    """What SIGUSR1 prints."""
    size = mebibytes(sum(area.size for area in ram))
    if status.observed_bytes:
        return [
            f"{status.state} for {status.seconds:.1f} s: {size}; the host is not told which pages "
            "the guest shares"
        ]
    words = []
    for state in sorted(PageState, key=lambda state: state.value):
        runs = pages.count(state)
        if runs:
            plural = "s" if runs > 1 else ""
            words.append(f"{mebibytes(pages.total(state))} {state.value} in {runs} run{plural}")
    return [
        f"{status.state} for {status.seconds:.1f} s: {', '.join(words)}; "
        f"{status.conversions} conversions, {status.refused} refused",
        f"[{page_map(pages, ram)}] {size}, .private #shared ~deferred +several",
    ]


class StatusLine:
    """Draws while the loop runs; `close` leaves the terminal as it was."""

    def __init__(
        self,
        show: Callable[[str], object],
        every: float,
        begin: Callable[[], object] = lambda: None,
        end: Callable[[], object] = lambda: None,
    ) -> None:
        self._show = show
        self._every = every
        self._begin = begin
        self._end = end

    def start(self, loop: EventLoop, operations: Operations) -> None:
        self._begin()
        self._loop = loop
        self._operations = operations
        self._before = operations.status()
        self._plan()

    def _plan(self) -> None:
        self._loop.set_timer(time.monotonic() + self._every, self._update)

    def _update(self) -> None:
        now = self._operations.status()
        self._show(status_line(now, self._before))
        self._before = now
        self._plan()

    def close(self) -> None:
        self._end()


def choose_status_line(
    interject: Callable[[bytes], bool],
    environment: Mapping[str, str] = os.environ,
    stdout: int = 1,
    stderr: int = 2,
) -> StatusLine:
    """The place that fits. Raises UsageError where there is none.

    `interject` writes to the guest's terminal between two pieces of the guest's output, and says
    whether it has.
    """
    if not os.isatty(stderr):
        return StatusLine(lambda text: _write(stderr, f"pyvmm: {text}\n"), LOG_SECONDS)
    if not os.isatty(stdout) or os.fstat(stdout).st_rdev != os.fstat(stderr).st_rdev:
        return StatusLine(
            lambda text: _write(stderr, f"\r{_fitting(text, stderr)}\x1b[K"),
            UPDATE_SECONDS,
            end=lambda: _write(stderr, "\r\x1b[K"),
        )
    terminal = environment.get("TERM", "")
    if terminal in _UNTITLED:
        raise UsageError(
            f"--status: this terminal (TERM={terminal}) is the guest's console and has no title; "
            "send stderr to another terminal or to a file"
        )
    # A title that doesn't fit in between the guest's output now is drawn the next time.
    return StatusLine(
        lambda text: interject(f"\x1b]2;pyvmm: {text}\x07".encode()),
        UPDATE_SECONDS,
        begin=lambda: interject(_SAVE_TITLE),
        end=lambda: interject(_RESTORE_TITLE),
    )


def _fitting(text: str, fd: int) -> str:
    """As much of `text` as the terminal has columns: a line that wraps can't be updated."""
    columns = 0
    with contextlib.suppress(OSError):
        columns = os.get_terminal_size(fd).columns
    return text[: (columns or 80) - 1]


def _write(fd: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, text.encode())
