"""The real `pyvmm` as a process: on a terminal of its own, or on pipes; never for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 60.0
COMMAND = (sys.executable, "-m", "vmm")


class Session:
    """A command whose stdin and stdout are a terminal (its master end is here), stderr a pipe.

    With `controlling` the terminal controls the command's session, as a shell's does.
    """

    def __init__(self, arguments: Sequence[str], *, controlling: bool = False) -> None:
        self.master, self._slave = os.openpty()
        self.modes_before = self.modes()
        self.output = b""
        self.process = subprocess.Popen(
            [*(["setsid", "--ctty"] if controlling else []), *COMMAND, *arguments],
            cwd=ROOT, stdin=self._slave, stdout=self._slave,
            stderr=subprocess.PIPE, start_new_session=not controlling,
        )  # fmt: skip
        self._watchdog = threading.Timer(TIME_LIMIT, self.process.kill)
        self._watchdog.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watchdog.cancel()
        self._watchdog.join()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self.master)
        os.close(self._slave)

    def wait_until_stopped(self) -> None:
        """The command was sent a signal that stops it, and has stopped."""
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"it did not stop but ended: {status:#x}"

    def modes(self) -> list[Any]:
        """The terminal's modes, as tcgetattr gives them."""
        return termios.tcgetattr(self._slave)

    @property
    def is_raw(self) -> bool:
        return not self.modes()[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def expect(self, text: bytes) -> None:
        """Read output until `text` has come; the watchdog ends the wait for what never comes."""
        while text not in self.output:
            if self.process.poll() is not None:
                raise AssertionError(f"ended without {text!r}: {self.output!r}")
            self.output += os.read(self.master, 65536)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def wait(self) -> tuple[int, str]:
        """Exit status and stderr; negative: the signal that killed it (the watchdog's is 9)."""
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode()
        return self.process.wait(), said


def run(
    *arguments: str, before: Sequence[str] = (), **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """The command on pipes, stdin empty unless given, with a time limit; `before`: a command that
    runs it."""
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("cwd", ROOT)
    return subprocess.run(
        [*before, *COMMAND, *arguments], timeout=TIME_LIMIT, check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip
