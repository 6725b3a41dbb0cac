"""pyvmm and QEMU as processes: started from nothing, never for ever."""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import vmm
from vmm.core.errors import HostError

TIME_LIMIT = 120.0
_ROOT = str(Path(vmm.__file__).resolve().parents[1])


_SCRIPT = "from vmm.cli.main import entry_point; entry_point()"


def pyvmm(*options: str) -> list[str]:
    """The words that start this very pyvmm, as its console script does."""
    return [sys.executable, "-c", _SCRIPT, *options]


@functools.cache
def environment() -> dict[str, str]:
    """Ours, with pyvmm where Python finds it, and compiled as an installation is: what a run
    compiles is kept for those after it, whatever is set here and whoever owns the source."""
    kept = tempfile.TemporaryDirectory(prefix="pyvmm-bench-")
    atexit.register(kept.cleanup)
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPATH": _ROOT, "PYTHONPYCACHEPREFIX": kept.name}


def output_of(words: Sequence[str]) -> str:
    """Run to the end; stdout. Raises HostError with what it said when it fails."""
    done = subprocess.run(
        words, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=TIME_LIMIT, check=False, errors="replace",
    )  # fmt: skip
    # isa-debug-exit ends QEMU with an odd status.
    if done.returncode not in (0, 1, 105) or "done" not in done.stdout:
        raise HostError(
            f"{Path(words[0]).name} ended with status {done.returncode}: "
            f"{done.stdout[-300:]} {done.stderr[-500:]}"
        )
    return done.stdout


def seconds_to_first_byte(words: Sequence[str]) -> float:
    """From exec until the first byte is on stdout; the process is ended then."""
    read_end, write_end = os.pipe()
    started = time.perf_counter()
    with subprocess.Popen(
        words, env=environment(), stdin=subprocess.DEVNULL, stdout=write_end,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(write_end)
        first = os.read(read_end, 1)
        seconds = time.perf_counter() - started
        process.kill()
    os.close(read_end)
    if not first:
        raise HostError(f"{Path(words[0]).name} ended without a word")
    return seconds
