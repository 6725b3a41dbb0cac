"""The console without a guest: terminal modes, Ctrl-A, back-pressure, outputs that go away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import termios
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm.control.console import Console
from vmm.core.event_loop import EventLoop

FIFO = 16


class FakeUart:
    """The receiving side of a UART with a FIFO; `drain` is the guest reading it empty."""

    def __init__(self, room: Callable[[], None]) -> None:
        self.fifo = b""
        self.read = b""
        self.eager = False
        """Whether the guest reads whenever the FIFO is full."""
        self.offers = 0
        self.wanted: int | None = None
        self.enough: Callable[[], None] = lambda: None
        """Called once `wanted` bytes have come in."""
        self._room = room

    def receive(self, data: bytes) -> int:
        self.offers += 1
        accepted = min(len(data), FIFO - len(self.fifo))
        self.fifo += data[:accepted]
        if self.eager and len(self.fifo) == FIFO:
            self.drain()
        if self.wanted is not None and len(self.read + self.fifo) >= self.wanted:
            self.enough()
        return accepted

    def can_receive(self) -> bool:
        return len(self.fifo) < FIFO

    def drain(self) -> None:
        self.read += self.fifo
        self.fifo = b""
        self._room()


class Settled(Exception):
    """Leaves the loop without stopping it for good."""


class Bench:
    """A console between `stdin`, `stdout` and a fake UART, with a loop that a test steps."""

    def __init__(self, stdin: int, stdout: int) -> None:
        self.loop = EventLoop()
        self.quits = 0
        self.console = Console(self._quit, stdin, stdout)
        self.uart = FakeUart(self.console.room)
        self.uart.enough = self.loop.stop

    def _quit(self) -> None:
        self.quits += 1

    def attach(self) -> None:
        self.console.attach(self.loop, self.uart)

    def settle(self) -> None:
        """Serve what is ready, a few rounds long; then nothing but the marker is left."""
        rounds = iter(range(4))
        marker = os.eventfd(1, os.EFD_NONBLOCK)

        def served() -> None:
            if next(rounds, None) is None:
                raise Settled

        self.loop.add(marker, served)
        with pytest.raises(Settled):
            self.loop.run()
        self.loop.remove(marker)
        os.close(marker)

    def until(self, count: int) -> bytes:
        """Run the loop until `count` bytes have reached the guest; they."""
        self.uart.eager = True
        self.uart.wanted = count
        if len(self.uart.read + self.uart.fifo) < count:
            self.uart.drain()
            self.loop.run()
        return self.uart.read + self.uart.fifo

    def close(self) -> None:
        self.console.close()
        self.loop.close()


class Fds:
    """Opens fds that the test's end closes."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def own(self, *fds: int) -> tuple[int, ...]:
        self._fds.extend(fds)
        return fds

    def pipe(self) -> tuple[int, int]:
        read_end, write_end = self.own(*os.pipe())
        return read_end, write_end

    def pty(self) -> tuple[int, int]:
        master, slave = self.own(*os.openpty())
        return master, slave

    def type(self, master: int, slave: int, data: bytes) -> None:
        """Type `data`, and wait until the (raw) terminal has it: the kernel hands it on later."""
        os.write(master, data)
        here = array("i", [0])
        while here[0] < len(data):
            select.select([slave], [], [])
            fcntl.ioctl(slave, termios.FIONREAD, here)

    def close(self, *fds: int) -> None:
        for fd in fds or tuple(self._fds):
            self._fds.remove(fd)
            os.close(fd)


@pytest.fixture
def fds() -> Iterator[Fds]:
    made = Fds()
    yield made
    made.close(*made._fds)


@pytest.fixture
def bench_on(fds: Fds) -> Iterator[Callable[[int], Bench]]:
    """Makes the bench for a stdin; its stdout is /dev/null unless a second fd is given."""
    made: list[Bench] = []

    def make(stdin: int, stdout: int | None = None) -> Bench:
        if stdout is None:
            (stdout,) = fds.own(os.open(os.devnull, os.O_WRONLY))
        made.append(Bench(stdin, stdout))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


MakeBench = Callable[..., Bench]
PATTERN = bytes(range(256)) * 64  # 16 KiB that shows losses and repetitions


# -- the terminal's modes -------------------------------------------------------------------------


def test_terminal_is_raw_while_attached_and_as_before_afterwards(
    fds: Fds, bench_on: MakeBench
) -> None:
    _, slave = fds.pty()
    before = termios.tcgetattr(slave)
    bench = bench_on(slave)

    bench.attach()
    during = termios.tcgetattr(slave)
    bench.console.restore()

    assert not during[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    assert termios.tcgetattr(slave) == before


def test_close_restores_a_terminal_that_was_left_raw(fds: Fds, bench_on: MakeBench) -> None:
    _, slave = fds.pty()
    before = termios.tcgetattr(slave)
    bench = Bench(slave, slave)
    bench.attach()

    bench.close()

    assert termios.tcgetattr(slave) == before


def test_restore_of_a_terminal_that_is_gone_does_nothing(fds: Fds, bench_on: MakeBench) -> None:
    master, slave = fds.pty()
    bench = bench_on(slave)
    bench.attach()

    fds.close(master)

    bench.console.restore()


# -- Ctrl-A ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "guest_sees", "quits"),
    [
        (b"ls\r", b"ls\r", 0),
        (b"\x03\x1a\x1c\x04", b"\x03\x1a\x1c\x04", 0),
        (b"\x01x", b"", 1),
        (b"\x01X", b"", 1),
        (b"\x01\x01", b"\x01", 0),
        (b"\x01\x01x", b"\x01x", 0),
        (b"a\x01hb", b"ab", 0),
        (b"\x01q", b"\x01q", 0),
        (b"a\x01\x01b\x01x", b"a\x01b", 1),
    ],
)
def test_typed_bytes_reach_the_guest_but_for_commands(
    fds: Fds, bench_on: MakeBench, typed: bytes, guest_sees: bytes, quits: int
) -> None:
    master, slave = fds.pty()
    bench = bench_on(slave)
    bench.attach()
    fds.type(master, slave, typed)

    bench.settle()

    assert bench.uart.fifo == guest_sees
    assert bench.quits == quits


def test_command_may_come_in_two_reads(fds: Fds, bench_on: MakeBench) -> None:
    master, slave = fds.pty()
    bench = bench_on(slave)
    bench.attach()

    for part in (b"\x01", b"x"):
        fds.type(master, slave, part)
        bench.settle()

    assert bench.quits == 1
    assert bench.uart.fifo == b""


def test_help_is_shown_to_the_user_and_not_to_the_guest(fds: Fds, bench_on: MakeBench) -> None:
    master, slave = fds.pty()
    bench = bench_on(slave, slave)
    bench.attach()
    fds.type(master, slave, b"\x01h")

    bench.settle()

    assert b"Ctrl-A x  quit" in os.read(master, 4096)
    assert bench.uart.fifo == b""


def test_help_does_not_wait_for_a_stdout_that_nobody_reads(fds: Fds, bench_on: MakeBench) -> None:
    # The loop's thread would wait for ever, and Ctrl-A x or a signal would end nothing.
    master, slave = fds.pty()
    _, write_end = fds.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    bench = bench_on(slave, write_end)
    bench.attach()
    fds.type(master, slave, b"\x01h\x01x")

    bench.settle()

    assert bench.quits == 1


def test_ctrl_a_on_a_pipe_is_data(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(read_end)
    bench.attach()
    os.write(write_end, b"\x01x")

    bench.settle()

    assert bench.uart.fifo == b"\x01x"
    assert bench.quits == 0


# -- back-pressure --------------------------------------------------------------------------------


def test_full_uart_leaves_the_rest_in_the_pipe(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(read_end)
    bench.attach()
    os.write(write_end, PATTERN)

    bench.settle()

    # What is not in the FIFO or in one read's worth of pending bytes waits in the pipe.
    assert bench.uart.fifo == PATTERN[:FIFO]
    assert bench.uart.offers == 1  # and the loop rests until there is room
    left = os.read(read_end, len(PATTERN))
    assert left == PATTERN[-len(left) :]
    assert len(left) >= len(PATTERN) - 4096


def test_pipe_is_delivered_whole_once_the_guest_reads(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(read_end)
    bench.attach()
    os.write(write_end, PATTERN)
    bench.settle()

    assert bench.until(len(PATTERN)) == PATTERN


def test_terminal_is_delivered_whole_once_the_guest_reads(fds: Fds, bench_on: MakeBench) -> None:
    master, slave = fds.pty()
    bench = bench_on(slave)
    bench.attach()
    typed = PATTERN[2:256] * 8  # no Ctrl-A in it
    writer = threading.Thread(target=os.write, args=(master, typed))
    writer.start()

    assert bench.until(len(typed)) == typed

    writer.join()


def test_command_works_while_the_guest_reads_nothing(fds: Fds, bench_on: MakeBench) -> None:
    master, slave = fds.pty()
    bench = bench_on(slave)
    bench.attach()
    typed = bytes(range(0x20, 0x7F))
    fds.type(master, slave, typed)
    bench.settle()

    fds.type(master, slave, b"\x01x!")
    bench.settle()

    assert bench.quits == 1
    assert bench.uart.fifo == typed[:FIFO]
    assert bench.until(len(typed) + 1) == typed + b"!"


def test_only_so_much_is_kept_of_what_nobody_reads(
    fds: Fds, bench_on: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmm.control.console._MOST_TYPED", 100)
    master, slave = fds.pty()
    bench = bench_on(slave)
    bench.attach()
    for typed in (b"a" * FIFO, b"b" * 90, b"c" * 90, b"\x01x"):
        fds.type(master, slave, typed)
        bench.settle()

    assert bench.quits == 1
    kept = b"a" * FIFO + b"b" * 90 + b"c" * 10
    assert bench.until(len(kept)) == kept


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 4112, len(PATTERN)])
def test_regular_file_is_delivered_whole(
    fds: Fds, bench_on: MakeBench, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "input"
    path.write_bytes(PATTERN[:size])
    (stdin,) = fds.own(os.open(path, os.O_RDONLY))
    bench = bench_on(stdin)
    bench.attach()

    assert bench.until(size) == PATTERN[:size]


def test_bytes_typed_one_by_one_arrive_one_by_one(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(read_end)
    bench.attach()

    for count, byte in enumerate(b"hello", start=1):
        os.write(write_end, bytes((byte,)))
        bench.settle()
        assert bench.uart.fifo == b"hello"[:count]


@pytest.mark.parametrize("make_room_first", [False, True])
def test_room_without_input_changes_nothing(
    fds: Fds, bench_on: MakeBench, make_room_first: bool
) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(read_end)
    bench.attach()
    if make_room_first:
        bench.uart.drain()
        bench.settle()
    os.write(write_end, b"x")

    bench.settle()

    assert bench.uart.fifo == b"x"


# -- stdin that is no use -------------------------------------------------------------------------


def test_dev_null_as_stdin_is_the_end_of_input(fds: Fds, bench_on: MakeBench) -> None:
    (stdin,) = fds.own(os.open(os.devnull, os.O_RDONLY))
    bench = bench_on(stdin)

    bench.attach()
    bench.settle()

    assert bench.uart.fifo == b""


def test_pipe_whose_writer_left_delivers_its_bytes_and_then_rests(
    fds: Fds, bench_on: MakeBench
) -> None:
    read_end, write_end = fds.pipe()
    os.write(write_end, b"last words")
    fds.close(write_end)
    bench = bench_on(read_end)
    bench.attach()

    bench.settle()
    bench.uart.drain()
    bench.settle()

    assert bench.uart.read == b"last words"
    # A hung-up pipe is always "readable": watching it further would keep the loop busy.
    assert not bench.console._watching


class Clock:
    """Stands for the loop's timers: a test lets the time come."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr(
            bench.loop, "set_timer", lambda when, call: self.timers.append((when, call))
        )
        monkeypatch.setattr("time.monotonic", lambda: 100.0)

    def come(self) -> float:
        """The only timer's time comes; after how many seconds."""
        ((when, call),) = self.timers
        self.timers.clear()
        call()
        return when - 100.0


@pytest.mark.parametrize(
    ("text", "end"),
    [(b"uname -a\n", b"\x15\x04"), (b"poweroff -f", b"\n\x15\x04")],
)
def test_script_that_ends_is_ended_as_on_a_terminal_until_the_guest_does(
    fds: Fds, bench_on: MakeBench, monkeypatch: pytest.MonkeyPatch, text: bytes, end: bytes
) -> None:
    read_end, write_end = fds.pipe()
    os.write(write_end, text)
    fds.close(write_end)
    bench = bench_on(stdin=read_end)
    clock = Clock(bench, monkeypatch)
    bench.uart.eager = True
    bench.attach()
    bench.settle()
    bench.uart.drain()
    assert bench.uart.read == text  # and nothing yet that it hasn't asked for

    after = [clock.come() for _ in range(7)]
    bench.settle()
    bench.uart.drain()

    assert after == [0.5, 1, 2, 4, 8, 10, 10]
    assert (bench.uart.read + bench.uart.fifo).startswith(text + end + 6 * b"\x15\x04")


def test_end_waits_until_the_guest_has_taken_the_script(
    fds: Fds, bench_on: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = fds.pipe()
    os.write(write_end, bytes(range(2 * FIFO)))
    fds.close(write_end)
    bench = bench_on(stdin=read_end)
    clock = Clock(bench, monkeypatch)
    bench.attach()
    bench.settle()
    assert clock.timers == []

    for _ in range(3):
        bench.uart.drain()
        bench.settle()

    assert bench.uart.read == bytes(range(2 * FIFO))
    assert len(clock.timers) == 1


@pytest.mark.parametrize("empty", ["pipe", "/dev/null"])
def test_input_that_was_empty_tells_no_end(
    fds: Fds, bench_on: MakeBench, monkeypatch: pytest.MonkeyPatch, empty: str
) -> None:
    if empty == "pipe":
        stdin, write_end = fds.pipe()
        fds.close(write_end)
    else:
        (stdin,) = fds.own(os.open(empty, os.O_RDONLY))
    bench = bench_on(stdin=stdin)
    clock = Clock(bench, monkeypatch)

    bench.attach()
    bench.settle()

    assert clock.timers == []


def test_closed_stdin_is_the_end_of_input(fds: Fds, bench_on: MakeBench) -> None:
    read_end, _ = fds.pipe()
    bench = bench_on(read_end)
    fds.close(read_end)

    bench.attach()
    bench.settle()

    assert bench.uart.fifo == b""


def test_terminal_that_hangs_up_is_the_end_of_input(fds: Fds, bench_on: MakeBench) -> None:
    master, slave = fds.pty()
    bench = bench_on(slave)
    bench.attach()

    fds.close(master)
    bench.settle()

    assert not bench.console._watching


# -- output ---------------------------------------------------------------------------------------


def test_output_goes_to_stdout_and_its_tail_is_kept(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(fds.pipe()[0], write_end)

    bench.console.output(b"hello ")
    bench.console.output(b"world")

    assert os.read(read_end, 100) == b"hello world"
    assert bench.console.tail() == b"hello world"


def test_tail_keeps_the_last_bytes_only(fds: Fds, bench_on: MakeBench) -> None:
    bench = bench_on(fds.pipe()[0])

    for start in range(0, len(PATTERN) * 4, 1024):
        bench.console.output(PATTERN[start % len(PATTERN) :][:1024])

    assert bench.console.tail() == PATTERN[-8192:]


def test_closed_pipe_as_stdout_is_given_up_silently(
    fds: Fds, bench_on: MakeBench, capfd: pytest.CaptureFixture[str]
) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(fds.pipe()[0], write_end)
    fds.close(read_end)

    bench.console.output(b"one")
    bench.console.output(b"two")

    assert bench.console.tail() == b"onetwo"
    assert capfd.readouterr().err == ""


def test_full_disk_behind_stdout_is_told_once(
    fds: Fds, bench_on: MakeBench, capfd: pytest.CaptureFixture[str]
) -> None:
    (stdout,) = fds.own(os.open("/dev/full", os.O_WRONLY))
    bench = bench_on(fds.pipe()[0], stdout)

    bench.console.output(b"one")
    bench.console.output(b"two")

    said = capfd.readouterr().err
    assert said == ("pyvmm: console output is lost from here on: No space left on device\n")


def test_non_blocking_stdout_gets_everything(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    os.set_blocking(write_end, False)
    bench = bench_on(fds.pipe()[0], write_end)
    data = PATTERN * 16  # more than a pipe holds
    writer = threading.Thread(target=bench.console.output, args=(data,))
    writer.start()

    got = b""
    while len(got) < len(data):
        got += os.read(read_end, 65536)

    writer.join()
    assert got == data


def test_abandoned_output_is_dropped(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(fds.pipe()[0], write_end)
    bench.console.output(b"before")

    bench.console.abandon_output()
    bench.console.output(b"after")

    fds.close(write_end)
    assert os.read(read_end, 100) == b"before"
    assert os.read(read_end, 100) == b""


def test_close_leaves_the_callers_stdout_open(fds: Fds) -> None:
    read_end, write_end = fds.pipe()
    bench = Bench(fds.pipe()[0], write_end)

    bench.close()

    os.write(write_end, b"still open")
    assert os.read(read_end, 100) == b"still open"


# -- a word of ours in between --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guest", "fits"),
    [
        (b"", True),
        (b"plain\r\n", True),
        (b"\x1b[31mred", True),
        (b"\x1b]2;title\x07", True),
        (b"\x1b]2;title\x1b\\", True),
        ("ä".encode(), True),
        (b"\x1b", False),
        (b"\x1b[", False),
        (b"\x1b[31;1", False),
        (b"\x1b(", False),
        (b"\x1b]2;tit", False),
        (b"\x1b]2;title\x1b", False),
        ("ä".encode()[:1], False),
        ("€".encode()[:2], False),
        ("😀".encode()[:3], False),
    ],
)
def test_interjection_waits_for_the_end_of_a_sequence_or_character(
    fds: Fds, bench_on: MakeBench, guest: bytes, fits: bool
) -> None:
    read_end, write_end = fds.pipe()
    bench = bench_on(fds.pipe()[0], write_end)
    bench.console.output(guest)

    assert bench.console.interject(b"!") is fits

    bench.console.output(b".")
    assert os.read(read_end, 100) == guest + (b"!." if fits else b".")


def test_interjection_is_no_output_of_the_guest(fds: Fds, bench_on: MakeBench) -> None:
    bench = bench_on(fds.pipe()[0])
    bench.console.output(b"guest")

    bench.console.interject(b"ours")

    assert bench.console.tail() == b"guest"


def test_interjection_does_not_wait_for_output_under_way(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    size = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
    bench = bench_on(fds.pipe()[0], write_end)
    guest = threading.Thread(target=bench.console.output, args=(bytes(size + 1),))
    guest.start()
    while len_in(read_end) < size:
        pass

    assert bench.console.interject(b"ours") is False

    os.read(read_end, size)
    guest.join(10)


def test_interjection_with_patience_follows_output_under_way(fds: Fds, bench_on: MakeBench) -> None:
    read_end, write_end = fds.pipe()
    size = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)
    bench = bench_on(fds.pipe()[0], write_end)
    guest = threading.Thread(target=bench.console.output, args=(bytes(size + 1),))
    guest.start()
    while len_in(read_end) < size:
        pass
    reader = threading.Timer(0.05, os.read, (read_end, size))
    reader.start()

    assert bench.console.interject(b"ours", patience=10) is True

    reader.join()
    guest.join(10)
    assert os.read(read_end, 100) == b"\0ours"


def len_in(fd: int) -> int:
    """How many bytes a pipe holds."""
    held = array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, held)
    return held[0]


class ThirstyUart:
    """A UART that another vCPU empties as quickly as it is filled."""

    def __init__(self) -> None:
        self.taken = 0

    def receive(self, data: bytes) -> int:
        self.taken += len(data)
        return len(data)

    def can_receive(self) -> bool:
        return True


def test_input_file_that_a_guest_takes_at_once_does_not_keep_the_loop(tmp_path: Path) -> None:
    """All of a file went in at once, by recursion; the rest follows in the loop's next rounds."""
    path = tmp_path / "input"
    path.write_bytes(bytes(1 << 20))
    stdin, null = os.open(path, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
    loop, uart = EventLoop(), ThirstyUart()
    console = Console(loop.stop, stdin, null)

    console.attach(loop, uart)

    assert 0 < uart.taken <= 128 << 10
    while uart.taken < 1 << 20:
        before = uart.taken
        loop.set_timer(0.0, loop.stop)
        loop._stopping = False
        loop.run()
        assert before < uart.taken <= before + (256 << 10)
    console.close()
    loop.close()
    os.close(stdin)
    os.close(null)
