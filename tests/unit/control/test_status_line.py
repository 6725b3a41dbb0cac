"""--status and SIGUSR1: what they say, and where it goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.status import status
from vmm.control import status_line as module
from vmm.control.operations import Status
from vmm.control.status_line import choose_status_line, page_map, page_summary, status_line
from vmm.core.errors import UsageError
from vmm.core.event_loop import EventLoop
from vmm.core.ranges import Range, RangeMap
from vmm.memory.guest_memory import PageState

MIB = 1 << 20


def test_line_has_states_and_rates() -> None:
    before = status(seconds=1.0, conversions=10, exits=100)
    now = status(
        seconds=3.0, conversions=34, exits=1100, refused=2,
        shared_bytes=65 * MIB // 2, private_bytes=100 * MIB,
    )  # fmt: skip

    assert status_line(now, before) == (
        "shared 32.5 MiB, private 100.0 MiB, 12 conversions/s, 2 refused, 500 exits/s"
    )


def test_line_says_that_the_guest_is_paused_and_what_is_deferred() -> None:
    now = status(state="paused", deferred_bytes=MIB)

    line = status_line(now, now)

    assert line.startswith("paused, shared") and "private 0.0 MiB + 1.0 MiB deferred" in line


def states_of(*runs: tuple[int, int, str]) -> tuple[RangeMap[PageState | None], list[Range]]:
    """The states, and the ranges of RAM."""
    states: RangeMap[PageState | None] = RangeMap(Range(0, runs[-1][0] + runs[-1][1]), None)
    ram: list[Range] = []
    for start, size, state in runs:
        states.set(Range(start, size), PageState(state))
        if ram and ram[-1].end == start:
            ram[-1] = Range(ram[-1].start, ram[-1].size + size)
        else:
            ram.append(Range(start, size))
    return states, ram


@pytest.mark.parametrize(
    ("pages", "drawn"),
    [
        ([(0, 64, "private")], "........"),
        ([(0, 32, "private"), (32, 32, "shared")], "....####"),
        ([(0, 12, "private"), (12, 4, "shared"), (16, 48, "private")], ".+......"),
        ([(0, 32, "private"), (1 << 32, 32, "deferred")], "....~~~~"),
        ([(0, 36, "private"), (1 << 32, 28, "deferred")], "....+~~~"),
        ([(0, 8, "private"), (8, 56, "converting")], ".+++++++"),
        ([(0, 4, "private")], "...."),  # fewer pages than columns
    ],
)
def test_page_map_draws_equal_parts_of_ram(pages: list[tuple[int, int, str]], drawn: str) -> None:
    assert page_map(*states_of(*pages), columns=8) == drawn


def test_summary_adds_up_each_state() -> None:
    pages = [(0, MIB, "private"), (MIB, MIB, "shared"), (2 * MIB, 2 * MIB, "private")]

    first, second = page_summary(status(seconds=12.3, conversions=7, refused=1), *states_of(*pages))

    assert first == (
        "running for 12.3 s: 3.0 MiB private in 2 runs, 1.0 MiB shared in 1 run; "
        "7 conversions, 1 refused"
    )
    assert second.startswith("[" + "." * 16 + "#" * 16 + "." * 32 + "] 4.0 MiB")


def test_summary_walks_no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest can have made tens of thousands of them."""
    states, ram = states_of(*[(n, 1, ("private", "shared")[n % 2]) for n in range(1024)])
    monkeypatch.setattr(RangeMap, "runs", None)

    first, second = page_summary(status(), states, ram)

    assert "private in 512 runs" in first and "shared in 512 runs" in first
    assert second.startswith("[" + "+" * 64 + "]")


# -- where it goes --------------------------------------------------------------------------------


class Operations:
    """Its numbers grow with every look."""

    def __init__(self) -> None:
        self.looks = 0

    def status(self) -> Status:
        self.looks += 1
        return status(seconds=float(self.looks), exits=100 * self.looks)


@pytest.fixture
def terminals() -> Iterator[Callable[[], tuple[int, int]]]:
    """Makes terminals: (master, slave)."""
    opened: list[int] = []

    def make() -> tuple[int, int]:
        pair = os.openpty()
        opened.extend(pair)
        return pair

    yield make
    for fd in opened:
        os.close(fd)


def drawn(line: module.StatusLine, monkeypatch: pytest.MonkeyPatch, updates: int = 2) -> None:
    """Run a line for so many updates, without waiting for its period."""
    monkeypatch.setattr(line, "_every", 0.0)
    loop = EventLoop()
    operations = Operations()
    show = line._show

    def counting(text: str) -> None:
        show(text)
        if operations.looks > updates:
            loop.stop()

    monkeypatch.setattr(line, "_show", counting)
    line.start(loop, operations)  # type: ignore[arg-type]
    loop.run()
    line.close()
    loop.close()


def read_exactly(terminal: int, size: int) -> bytes:
    """A terminal hands over what has come so far."""
    seen = b""
    while len(seen) < size:
        seen += os.read(terminal, size - len(seen))
    return seen


def never(data: bytes) -> bool:
    raise AssertionError("the guest's terminal is not to be touched")


def test_stderr_on_a_terminal_of_its_own_is_one_line_updated_and_removed(
    terminals: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, stdout), (master, stderr) = terminals(), terminals()

    drawn(choose_status_line(never, {}, stdout, stderr), monkeypatch)

    line = b"\rshared 0.0 MiB, private 0.0 MiB, 0 conversions/s, 0 refused, 100 exits/s"
    expected = (line[:80] + b"\x1b[K") * 2 + b"\r\x1b[K"
    assert read_exactly(master, len(expected)) == expected


def test_line_is_no_longer_than_the_terminal_is_wide(
    terminals: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    master, stderr = terminals()
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((20, 24)))
    null = os.open(os.devnull, os.O_WRONLY)

    drawn(choose_status_line(never, {}, null, stderr), monkeypatch, updates=1)
    os.close(null)

    expected = b"\rshared 0.0 MiB, pri\x1b[K\r\x1b[K"
    assert read_exactly(master, len(expected)) == expected


def test_guests_own_terminal_gets_a_title_and_has_its_old_one_back(
    terminals: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, slave = terminals()
    written: list[bytes] = []

    def interject(data: bytes) -> bool:
        written.append(data)
        return True

    drawn(choose_status_line(interject, {"TERM": "xterm"}, slave, slave), monkeypatch)

    assert written[0] == b"\x1b[22;2t" and written[-1] == b"\x1b[23;2t"
    assert len(written) == 4
    assert written[1].startswith(b"\x1b]2;pyvmm: shared") and written[1].endswith(b"exits/s\x07")


@pytest.mark.parametrize("terminal", ["linux", "dumb", ""])
def test_guests_own_terminal_without_a_title_is_refused(
    terminals: Callable[[], tuple[int, int]], terminal: str
) -> None:
    _, slave = terminals()

    with pytest.raises(UsageError, match=f"TERM={terminal}.*send stderr"):
        choose_status_line(never, {"TERM": terminal}, slave, slave)


def test_stderr_that_is_no_terminal_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_end, write_end = os.pipe()
    line = choose_status_line(never, {}, 1, write_end)
    assert line._every == module.LOG_SECONDS

    drawn(line, monkeypatch)

    lines = os.read(read_end, 4096).decode().splitlines()
    os.close(read_end)
    os.close(write_end)
    assert len(lines) == 2
    assert all(text.startswith("pyvmm: shared") for text in lines)


def test_line_is_drawn_again_only_after_its_period(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[float] = []
    loop = EventLoop()
    monkeypatch.setattr(loop, "set_timer", lambda when, callback: timers.append(when))
    line = module.StatusLine(lambda text: None, 1.0)

    line.start(loop, Operations())  # type: ignore[arg-type]
    started = time.monotonic()
    loop.close()

    assert len(timers) == 1
    assert 0.5 < timers[0] - started <= 1.0
