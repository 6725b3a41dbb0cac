"""What programs inside a lab machine share: pyvmm there, a guest's shell, and its control socket.

`tests.lab.programs` has tests run them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.policies import Console

PYVMM = [sys.executable, "-sP", "/lab/project/pyvmm"]
SECONDS = 240.0
"""For a boot or a command: with two vCPUs, on a machine with other work, they take a minute."""


def pyvmm(kernel: str, initrd: str, *options: str) -> list[str]:
    """The words of a run with that guest."""
    return [*PYVMM, "--kernel", kernel, "--initrd", initrd, "--append", "quiet", *options]


def said(console: Console, command: str) -> str:
    """What the guest's shell prints; "(nothing)" when it comes to no prompt any more. Raises
    BrokenPipeError where pyvmm has ended."""
    console.type(command)
    text = console.expect_prompt(SECONDS) or "(nothing)"
    # busybox's shell asks the terminal where its cursor is.
    return text.replace("\x1b[6n", "").removeprefix(command).strip()


def ctl(path: Path, *words: str) -> tuple[int, Any]:
    """Exit status of `pyvmm ctl` for that socket, and what it prints; what it complains of where it
    prints nothing."""
    done = subprocess.run([*PYVMM, "ctl", str(path), *words], capture_output=True, check=False)
    answer = json.loads(done.stdout) if done.stdout else done.stderr.decode()
    return done.returncode, answer


@contextmanager
def telling(complaints: Path) -> Iterator[None]:
    """Where the program fails, what pyvmm has complained of is said as well."""
    try:
        yield
    except BaseException:
        print(complaints.read_text(), file=sys.stderr)
        raise
