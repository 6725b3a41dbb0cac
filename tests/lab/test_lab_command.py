"""`pyvmm lab` as a process: its streams, its terminal, and its end by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    words = command("--lab-exec", "sh", "-c", script, "sh", "f")

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
    words = command("--lab-exec", "sh", "-c", "stty size; read x; echo got $x; exit 12")

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


@contextmanager
def started(*words: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A lab command whose program has said that it is there."""
    with subprocess.Popen(
        command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=directory, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"
            yield process
        finally:
            process.kill()


def test_signal_reaches_the_command_and_its_outputs_come_back(lab: Lab, tmp_path: Path) -> None:
    script = "trap 'echo kept >out; exit 7' TERM; echo started; while :; do sleep 0.1; done"

    with started(
        "--lab-out", "out", "--lab-exec", "sh", "-c", script, directory=tmp_path
    ) as process:
        machine = children(process.pid)
        process.send_signal(signal.SIGTERM)
        status = process.wait()

    assert status == 7
    assert (tmp_path / "out").read_text() == "kept\n"
    assert machine and not [p for p in machine if Path(f"/proc/{p}").exists()]


def test_second_signal_ends_the_machine_of_a_command_that_ignores_the_first(
    lab: Lab, tmp_path: Path
) -> None:
    script = "trap 'echo told' INT; echo started; while :; do sleep 0.1; done"

    with started("--lab-exec", "sh", "-c", script, directory=tmp_path) as process:
        machine = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == b"told\n"
        process.send_signal(signal.SIGINT)
        status = process.wait()

    assert status == 128 + signal.SIGINT
    assert machine and not [p for p in machine if Path(f"/proc/{p}").exists()]


def environment() -> dict[str, str]:
    """The test's own, with the project on the path."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
