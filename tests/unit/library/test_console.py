"""The serial line of a program's machine: what is printed and typed goes where it should."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmm.core.event_loop import EventLoop
from vmm.library.console import ConsoleTarget, Line


class Uart:
    """Takes all that is typed, and ends the loop once that is `enough`."""

    def __init__(self, loop: EventLoop, enough: int) -> None:
        self.typed = b""
        self._loop, self._enough = loop, enough

    def receive(self, data: bytes) -> int:
        self.typed += data
        if len(self.typed) >= self._enough:
            self._loop.stop()
        return len(data)

    def can_receive(self) -> bool:
        return True


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


def nothing() -> None:
    """Nobody quits here."""


def test_function_gets_what_the_guest_prints() -> None:
    printed: list[bytes] = []
    line = Line(printed.append)
    console = line.connect(nothing)

    console.output(b"one")
    console.output(b"two")

    assert printed == [b"one", b"two"]
    assert console.tail() == b"onetwo"
    console.close()
    line.close()


def test_what_is_typed_reaches_the_guest_whole(loop: EventLoop) -> None:
    line = Line(None)
    console = line.connect(nothing)
    uart = Uart(loop, 7)

    assert line.type(b"a\x01x") == 3
    console.attach(loop, uart)
    assert line.type(b"more") == 4
    loop.run()

    assert uart.typed == b"a\x01xmore"
    console.close()
    line.close()


def test_typing_for_a_guest_that_does_not_read_never_waits() -> None:
    line = Line(None)

    while line.type(bytes(4096)):
        pass

    assert line.type(b"x") == 0
    line.close()


def test_pseudo_terminal_is_typed_on_by_who_opens_it(loop: EventLoop) -> None:
    line = Line("pty")
    assert line.path is not None
    terminal = os.open(line.path, os.O_RDWR | os.O_NOCTTY)
    console = line.connect(nothing)
    uart = Uart(loop, 4)
    console.attach(loop, uart)

    os.write(terminal, b"typed"[:4])
    loop.run()
    console.output(b"printed")

    assert uart.typed == b"type"
    assert os.read(terminal, 100) == b"printed"
    with pytest.raises(ValueError, match="open that"):
        line.type(b"x")
    os.close(terminal)
    console.close()
    line.close()


@pytest.mark.parametrize("target", [None, print, "pty", 1])
def test_closed_line_leaves_nothing_open(target: ConsoleTarget) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    line = Line(target)

    line.connect(nothing).close()
    line.close()
    line.close()

    assert sorted(os.listdir("/proc/self/fd")) == before


def test_target_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="console='stdout': a function, a file"):
        Line("stdout")
