"""How long a large trace takes to summarise, and how much memory.

    python tests/bench/trace_summary.py [--events 5000000] [--keep DIR]

The trace is made of what a long run has most of: exits, I/O, and conversions of single pages and
of ranges all over 4 GiB of RAM, with a refusal now and then. `pyvmm report` runs in a process of
its own; memory is the most that was resident, mapped columns included.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.trace.arrays import np
from vmm.trace.layout import COLUMNS, ROW, Kind
from vmm.trace.store import TraceStore

RAM = 4 << 30
NAMES = ["", "io", "wrmsr", "hypercall", "shared", "private", "blk0"]
_BATCH = 1 << 16


def write_trace(folder: Path, events: int, seed: int = 1) -> None:
    """40 % exits, 20 % I/O, 20 % requests, each with the change of state that came of it."""
    random = np.random.default_rng(seed)
    store = TraceStore(str(folder))
    done = 0
    while done < events:
        count = min(_BATCH, events - done)
        columns = _columns(random, done, count)
        rows = np.zeros((count, ROW.size), np.uint8)
        for column in COLUMNS:
            cells = columns[column.name].astype(column.dtype).view(np.uint8)
            width = slice(column.offset, column.offset + column.size)
            rows[:, width] = cells.reshape(count, column.size)
        store.append(memoryview(rows.tobytes()), count)
        done += count
    store.write_sidecar(
        {
            "names": NAMES,
            "states": [[0, RAM, "private"]],
            "complete": True,
            "scheme": "cbit",
            "doorbell": "hypercall",
        }
    )
    store.close()


def _columns(random: np.random.Generator, done: int, count: int) -> dict[str, np.ndarray]:
    what = random.choice(5, count, p=(0.4, 0.2, 0.1, 0.1, 0.2))
    choices = (Kind.EXIT, Kind.IO_IN, Kind.SHARE, Kind.UNSHARE, Kind.STATE)
    kind = np.choose(what, choices)
    pages = np.where(random.random(count) < 0.95, 1, 512)
    page = random.integers(0, (RAM >> 12) - 512, count)
    is_exit = kind == Kind.EXIT
    request = (kind == Kind.SHARE) | (kind == Kind.UNSHARE)
    refused = request & (random.random(count) < 0.01)
    names = np.choose(what, (1, 6, 3, 3, 4)) + ((kind == Kind.STATE) & (page % 2 == 0))
    return {
        "time_ns": (done + np.arange(count)) * 20_000,
        "gpa": np.where(is_exit, 0x3F8 + page % 8, page << 12),
        "bytes": np.where(is_exit, 0, pages << 12),
        "latency_ns": random.lognormal(10, 1, count),
        "detail": names,
        "errno": np.where(refused, 13, 0),
        "vcpu": page % 4,
        "kind": kind,
        "decision": np.where(request, np.where(refused, 2, 1), 0),
    }


def measure(folder: Path, *options: str) -> tuple[float, float]:
    """Seconds and MiB that `pyvmm report` takes."""
    command = [sys.executable, "-m", "vmm", "report", str(folder), *options]
    started = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.chdir(Path(__file__).resolve().parents[2])
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(command[0], command)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the trace there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.keep or Path(made) / "trace"
        write_trace(folder, options.events)
        page = str(Path(made) / "page.html")
        for name, words in (("text", ()), ("JSON", ("--json",)), ("page", ("--html", page))):
            seconds, mib = measure(folder, *words)
            size = f", {os.path.getsize(page) / 1e6:.1f} MB" if words[:1] == ("--html",) else ""
            print(f"{options.events:,} events, {name}: {seconds:.1f} s, {mib:.0f} MiB{size}")


if __name__ == "__main__":
    main()
