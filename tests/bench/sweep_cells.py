"""How long a sweep's cells take, and what a sweep adds to each.

    python tests/bench/sweep_cells.py [--cells 1000] [--workers 2] [--trace DIR] [--json FILE]

Replays a Debian 6.12 boot's requests (of --trace, else those of the scenario debian-6.12-boot) for
so many cells: by processes of this machine, then by a Dask scheduler and workers on loopback. Then
the same with a trace of one request, whose cells take next to no time: what is left is the sweep's
own work. Wall time is what counts, and needs a quiet machine; processor time, of this process and
of those that carry out cells, needs none. The parts are measured alone, in processor time of this
process: planning a cell, storing a result, asking a process for a cell, a Dask task, and what that
costs the scheduler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import vmm
from tests.support.trace import PAGE, Events
from vmm.scenario.recorded import recording
from vmm.scenario.recording import SHARE, UNSHARE
from vmm.sweeps import far
from vmm.sweeps.definition import parse
from vmm.sweeps.running import Prepared
from vmm.sweeps.store import Result, Store
from vmm.trace.layout import Kind

ROOT = Path(__file__).resolve().parents[2]


def write_boot(folder: Path) -> Path:
    """A trace with the requests of the scenario debian-6.12-boot; each takes 2 ms."""
    recorded = recording("debian-6.12-boot")
    ram = sorted((area.start // PAGE, area.size // PAGE, "private") for area in recorded.ram)
    made, at = Events(*ram), 0.0
    for event in recorded.events:
        at += event.pause / 1000
        if event.kind in (SHARE, UNSHARE):
            kind = Kind.SHARE if event.kind == SHARE else Kind.UNSHARE
            made.convert(kind, at, event.gpa // PAGE, event.size // PAGE, 2.0)
            at += 2.0
    return made.write(folder)


def write_nothing(folder: Path) -> Path:
    """A trace of one request."""
    made = Events((0, 64, "private"))
    made.convert(Kind.SHARE, 1, 0, 1)
    return made.write(folder)


def definition(trace: Path, cells: int) -> dict[str, Any]:
    """A grid of so many cells: two policies of different work, many limits."""
    half = cells // 2
    return {
        "policy": [
            {"use": "vmm.policy.builtin:Quota",
             "parameters": {"limit": [number << 16 for number in range(half)]}},
            {"use": "vmm.policy.builtin:DeferredDiscard",
             "parameters": {"seconds": [0.1], "limit": [n << 12 for n in range(cells - half)]}},
        ],
        "workload": [{"name": "boot", "replay": str(trace)}],
    }  # fmt: skip


class Took(NamedTuple):
    """Seconds: that passed, and of processors, here and in the processes that carried out cells."""

    wall: float
    here: float
    cells: float


def took(sweep: dict[str, Any], folder: Path, others: Sequence[int] = (), **how: Any) -> Took:
    """From the call to the last stored result; `others` are processes that did it, which
    we don't wait for."""
    store = folder / f"{time.monotonic_ns()}.sqlite"
    cpu, before, began = _cpu(), _cpu_of(others), time.perf_counter()
    results = vmm.sweep(sweep, store=store, **how)
    wall, after = time.perf_counter() - began, _cpu()
    if results.failed or results.missing:
        raise SystemExit(f"{len(results.failed)} cells failed, {results.missing} are missing")
    return Took(wall, after[0] - cpu[0], after[1] - cpu[1] + _cpu_of(others) - before)


def _cpu() -> tuple[float, float]:
    """Processor time of this process, and of those that it has waited for."""
    times = os.times()
    return times.user + times.system, times.children_user + times.children_system


def _cpu_of(processes: Sequence[int]) -> float:
    """Processor time of processes and of what they have started: /proc/PID/stat (proc_pid_stat(5)),
    fields 14 to 17, for each of their trees."""
    ticks, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    whole = set(processes)
    while more := {pid for pid, parent in parents.items() if parent in whole} - whole:
        whole |= more
    return sum(ticks.get(pid, 0) for pid in whole) / os.sysconf("SC_CLK_TCK")


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[tuple[str, list[int]]]:
    """A Dask scheduler and workers, processes of their own; the address, and the processes, the
    scheduler's first."""
    with ExitStack() as stack:
        processes: list[int] = []

        def start(*words: str, until: str) -> str:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "dask", *words, "--no-dashboard"],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
            )  # fmt: skip
            stack.callback(process.kill)
            processes.append(process.pid)
            assert process.stdout is not None
            return next(line for line in process.stdout if until in line).split()[-1]

        address = start("scheduler", "--host", "127.0.0.1", "--port", "0", until="Scheduler at:")
        for _ in range(workers):
            start("worker", address, "--nthreads", "1", "--no-nanny", until="Registered to:")
        yield address, processes


def parts(folder: Path, address: str, scheduler: int) -> dict[str, float]:
    """Processor seconds for each part of what a sweep does for a cell."""
    from distributed import Client

    found = {}
    definition(write_nothing(folder / "one"), 10)
    began = time.process_time()
    prepared = Prepared(parse(definition(folder / "one", 2000), "s", "s", ""))
    found["plan"] = (time.process_time() - began) / 2000
    with closing(prepared), closing(Store(str(folder / "parts.sqlite"), "s")) as store:
        job = prepared.plan.jobs[0]
        result = Result("ok", {"figure": 1.0}, None, None, None, "here", 0.0, 1)
        began = time.process_time()
        for number in range(2000):
            store.put(f"{number:064x}", {"policy": "A"}, [], result)
        found["store"] = (time.process_time() - began) / 2000
        prepared.runner.run(job.words, prepared.snapshot.places)
        began = time.process_time()
        for _ in range(500):
            prepared.runner.run(job.words, prepared.snapshot.places)
        found["ask a process"] = (time.process_time() - began) / 500
    make: Any = Client
    with closing(make(address, set_as_default=False)) as client:
        text = json.dumps({"sweep": "none", "jobs": []})
        client.submit(far.run_batch, text, pure=False).result()
        theirs, began = _cpu_of([scheduler]), time.process_time()
        futures = [client.submit(far.run_batch, text, pure=False, key=f"n{n}") for n in range(500)]
        client.gather(futures)
        found["Dask task, here"] = (time.process_time() - began) / 500
        found["Dask task, scheduler"] = (_cpu_of([scheduler]) - theirs) / 500
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--cells", type=int, default=1000)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--trace", type=Path, help="the boot's trace, of pyvmm --trace DIR")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    found: dict[str, Any] = {"cells": given.cells, "workers": given.workers}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        boot = given.trace or write_boot(folder / "boot")
        nothing = write_nothing(folder / "nothing")
        boots, nothings = (definition(each, given.cells) for each in (boot, nothing))
        with cluster(given.workers, folder) as (address, processes):
            for name, sweep in (("boot", boots), ("nothing", nothings)):
                local = took(sweep, folder, workers=given.workers)
                found[f"{name}, local"] = local._asdict()
                dask = took(sweep, folder, processes[1:], scheduler=address)
                found[f"{name}, Dask"] = dask._asdict()
            found["parts"] = parts(folder, address, processes[0])
    for name in ("boot, local", "boot, Dask", "nothing, local", "nothing, Dask"):
        wall, here, cells = (1000 * each / given.cells for each in found[name].values())
        print(
            f"{name:<16} {found[name]['wall']:6.1f} s for {given.cells} cells: {wall:.2f} ms each; "
            f"processor {here:.2f} ms here, {cells:.2f} ms in the cell's process"
        )
    for name, seconds in found["parts"].items():
        print(f"  {name:<22} {1e6 * seconds:6.0f} us")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
