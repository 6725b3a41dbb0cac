"""pyvmm and QEMU as processes: started from nothing, never for ever."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import vmm
from vmm import _firmware as firmware
from vmm.core.errors import HostError

TIME_LIMIT = 120.0
_ROOT = str(Path(vmm.__file__).resolve().parents[1])


_SCRIPT = "from vmm.cli.main import entry_point; entry_point()"


def pyvmm(*options: str) -> list[str]:
    """The words that start this very pyvmm, as its console script does."""
    return [sys.executable, "-c", _SCRIPT, *options]


def bench_guest() -> Path:
    """The bench guest of this machine's architecture. Raises HostError where it has none."""
    machine = os.uname().machine
    try:
        return Path(firmware.bench_path(machine))
    except LookupError:
        raise HostError(
            f"there is no bench guest for {machine}, which the sections disk, iommu and start-up "
            "run; measure them on an x86-64 machine"
        ) from None


@functools.cache
def environment() -> dict[str, str]:
    """Ours, with pyvmm where Python finds it, and compiled as an installation is: what a run
    compiles is kept for those after it, whatever is set here and whoever owns the source."""
    kept = tempfile.TemporaryDirectory(prefix="pyvmm-bench-")
    atexit.register(kept.cleanup)
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    # All of our path: pyvmm and what it needs may come from where only this process was told.
    path = os.pathsep.join([_ROOT, *filter(None, sys.path)])
    return {**inherited, "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": kept.name}


def results_of(words: Sequence[str]) -> list[tuple[str, int]]:
    """The lines of a bench guest that begin with "result", each with the nanoseconds that the
    host's threads, all but the vCPU's, were on a processor since the line before.

    Raises HostError when the guest doesn't come to its end.
    """
    lines: list[str] = []
    times: list[dict[str, int]] = []
    with subprocess.Popen(
        words, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace",
    ) as process:  # fmt: skip
        watchdog = threading.Timer(TIME_LIMIT, process.kill)
        watchdog.start()
        assert process.stdout is not None and process.stderr is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                # A thread that has ended keeps what it had.
                before = times[-1] if times else {}
                times.append({**before, **on_processor(process.pid)})
        finally:
            watchdog.cancel()
        said = process.stderr.read()
    if not lines or lines[-1] != "done":
        raise HostError(f"{Path(words[0]).name} broke off: {lines[-3:]} {said[-500:]}")
    last = times[-1]
    vcpu = max(last, key=lambda thread: last[thread])  # it polls, and never sleeps
    spent = [sum(ns for thread, ns in now.items() if thread != vcpu) for now in times]
    return [
        (line, spent[number] - spent[number - 1])
        for number, line in enumerate(lines)
        if line.startswith("result ")
    ]


def on_processor(pid: int) -> dict[str, int]:
    """Nanoseconds by thread (schedstat); threads that end just now are left out."""
    found = {}
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError, ValueError):
                stat = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text()
                found[thread] = int(stat.split()[0])
    return found


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
