"""The process that stays outside."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.core.errors import HostError
from vmm.sandbox.outside import Outside

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import os, sys
from pathlib import Path
from vmm.core.errors import OutputError
from vmm.sandbox.outside import Outside

def write(data):
    if data == b"bad":
        raise OutputError("no room")
    Path("written").write_bytes(data)

outside = Outside([write], lambda: Path("last").write_text("done"), [])
"""


def run(folder: Path, rest: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + rest],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_message_is_written_there_and_the_last_thing_done_at_the_end(tmp_path: Path) -> None:
    done = run(tmp_path, 'outside.do(0, b"x" * 300_000); outside.close(); outside.close()')

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "written").read_bytes() == b"x" * 300_000
    assert (tmp_path / "last").read_text() == "done"


def test_failure_there_is_raised_here(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "try:\n"
        '    outside.do(0, b"bad")\n'
        "except OutputError as error:\n"
        "    print(error)\n"
        'outside.do(0, b"good")\n'
        "outside.close()\n",
    )

    assert done.stdout == "no room\n", done.stderr
    assert (tmp_path / "written").read_bytes() == b"good"


def test_last_thing_is_done_when_the_process_is_killed(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "import signal\n"
        "child = os.fork()\n"  # it has the other end of the pipes, until it is killed
        "if child == 0:\n"
        "    signal.pause()\n"
        "os.close(outside._writer); os.close(outside._reader)\n"
        "os.kill(child, signal.SIGKILL)\n"
        "os.waitpid(outside._pid, 0)\n",
    )

    assert done.returncode == 0
    assert (tmp_path / "last").read_text() == "done"


def test_signals_of_a_terminal_do_not_end_it(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        'outside.do(0, b"first")\n'
        "os.kill(outside._pid, signal.SIGINT); os.kill(outside._pid, signal.SIGTERM)\n"
        'outside.do(0, b"second"); outside.close()\n',
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "written").read_bytes() == b"second"


def test_one_that_was_killed_is_an_output_error(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "import signal\n"
        "os.kill(outside._pid, signal.SIGKILL)\n"
        "try:\n"
        '    outside.do(0, b"x")\n'
        "except OutputError as error:\n"
        "    print(error)\n"
        "outside.close()\n",
    )

    assert done.stdout == "the process outside the sandbox has ended\n", done.stderr


def test_fork_that_fails_is_a_host_error_and_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(HostError, match="--sandbox=off"):
        Outside([lambda data: None], lambda: None, [])

    assert set(os.listdir("/proc/self/fd")) == before
