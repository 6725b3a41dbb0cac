"""A terminal made raw and given back, also one that goes away."""

from __future__ import annotations

import os
import termios
from collections.abc import Iterator

import pytest

from vmm.core.raw_terminal import RawTerminal


@pytest.fixture
def pty() -> Iterator[tuple[int, int]]:
    """(master, slave); the test may close the master."""
    master, slave = os.openpty()
    yield master, slave
    os.close(slave)
    if os.path.exists(f"/proc/self/fd/{master}"):
        os.close(master)


def is_raw(slave: int) -> bool:
    return not termios.tcgetattr(slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def test_terminal_is_raw_within_the_block_only(pty: tuple[int, int]) -> None:
    before = termios.tcgetattr(pty[1])

    with RawTerminal(pty[1]) as terminal:
        terminal.enter()
        assert terminal.is_raw and is_raw(pty[1])

    assert not terminal.is_raw
    assert termios.tcgetattr(pty[1]) == before


def test_terminal_that_has_gone_away_is_no_error(pty: tuple[int, int]) -> None:
    terminal = RawTerminal(pty[1])
    terminal.enter()
    os.close(pty[0])

    terminal.restore()

    assert not terminal.is_raw


def test_what_is_no_terminal_is_left_alone() -> None:
    read_end, write_end = os.pipe()

    with RawTerminal(read_end) as terminal:
        terminal.enter()
        assert not terminal.is_raw

    os.close(read_end)
    os.close(write_end)


def test_terminal_is_given_back_while_suspended_and_raw_again_when_resumed(
    pty: tuple[int, int],
) -> None:
    before = termios.tcgetattr(pty[1])
    terminal = RawTerminal(pty[1])
    terminal.enter()

    terminal.suspend()
    assert termios.tcgetattr(pty[1]) == before
    terminal.resume()

    assert is_raw(pty[1])
    terminal.restore()
    assert termios.tcgetattr(pty[1]) == before


def test_resumed_terminal_that_a_shell_changed_is_raw_again_and_restored_as_at_first(
    pty: tuple[int, int],
) -> None:
    before = termios.tcgetattr(pty[1])
    terminal = RawTerminal(pty[1])
    terminal.enter()
    termios.tcsetattr(pty[1], termios.TCSANOW, before)  # after a SIGSTOP, which nobody sees coming

    terminal.resume()

    assert is_raw(pty[1])
    terminal.restore()
    assert termios.tcgetattr(pty[1]) == before


def test_terminal_that_is_not_raw_stays_so_when_resumed(pty: tuple[int, int]) -> None:
    terminal = RawTerminal(pty[1])
    terminal.resume()
    assert not is_raw(pty[1])

    terminal.enter()
    terminal.restore()
    terminal.resume()

    assert not is_raw(pty[1])
