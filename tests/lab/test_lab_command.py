"""`pyvmm lab` as a process: its streams, its terminal, and its end by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmm.lab.machine import Lab

_COMMAND = "import sys; from vmm.lab.command import run; sys.exit(run(sys.argv[1:]))"


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", _COMMAND, "--lab-time-limit", "300", *words]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A pseudo-terminal of 30 rows and 90 columns: (ours, the command's)."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (30, 90))
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def read_until(fd: int, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        chunk = os.read(fd, 4096)
        assert chunk, f"ended with {data!r}"
        data += chunk
    return data


def test_command_in_a_pipe_is_transparent(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("of the file")
    script = 'read x; echo "$x $(cat "$1")"; echo oops >&2; exit 11'
    words = command("--exec", "sh", "-c", script, "sh", "f")

    result = subprocess.run(
        words, input=b"line\n", capture_output=True, cwd=tmp_path, env=environment(), check=False
    )

    assert result.returncode == 11
    assert result.stdout == b"line of the file\n"
    progress = [line for line in result.stderr.splitlines() if line.startswith(b"lab: ")]
    assert progress and b"\x1b" not in result.stderr
    assert result.stderr.endswith(b"oops\n")


def test_command_on_a_terminal_passes_it_on_and_gives_it_back(
    lab: Lab, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    before = termios.tcgetattr(theirs)
    words = command("--exec", "sh", "-c", "stty size; read x; echo got $x; exit 12")

    with subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), start_new_session=True
    ) as process:
        read_until(ours, b"30 90\r\n")
        during = termios.tcgetattr(theirs)
        process.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        stopped = termios.tcgetattr(theirs)
        process.send_signal(signal.SIGCONT)
        while termios.tcgetattr(theirs) != during:
            time.sleep(0.01)
        os.write(ours, b"word\r")
        read_until(ours, b"got word\r\n")
        status = process.wait()

    assert status == 12
    assert not during[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    assert stopped == termios.tcgetattr(theirs) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_command_and_its_machine(number: signal.Signals, lab: Lab) -> None:
    words = command("--exec", "sh", "-c", "echo started; sleep 1000")

    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment()
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        machine = children(process.pid)
        process.send_signal(number)
        status = process.wait()

    assert status == 128 + number
    assert machine and not [p for p in machine if Path(f"/proc/{p}").exists()]


def environment() -> dict[str, str]:
    """The test's own, with the project on the path."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
