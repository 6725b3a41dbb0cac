"""How long a sweep's cells take, and what a sweep adds to each.

    python tests/bench/sweep_cells.py [--cells 1000] [--workers 2] [--trace DIR] [--json FILE]

Replays a Debian 6.12 boot's requests (of --trace, else those of the scenario debian-6.12-boot) for
so many cells: by processes of this machine, then by a Dask scheduler and workers on loopback. Then
the same with a trace of one request, whose cells take next to no time: what is left is the sweep's
own work. The parts of that are measured alone: planning a cell, storing a result, asking a process
for a cell, a Dask task.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

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


def seconds_of(sweep: dict[str, Any], folder: Path, **how: Any) -> float:
    """From the call to the last stored result."""
    store = folder / f"{time.monotonic_ns()}.sqlite"
    began = time.perf_counter()
    results = vmm.sweep(sweep, store=store, **how)
    took = time.perf_counter() - began
    if results.failed or results.missing:
        raise SystemExit(f"{len(results.failed)} cells failed, {results.missing} are missing")
    return took


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[str]:
    """A Dask scheduler and workers, processes of their own; the address."""
    with ExitStack() as stack:

        def start(*words: str, until: str) -> str:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "dask", *words, "--no-dashboard"],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
            )  # fmt: skip
            stack.callback(process.kill)
            assert process.stdout is not None
            return next(line for line in process.stdout if until in line).split()[-1]

        address = start("scheduler", "--host", "127.0.0.1", "--port", "0", until="Scheduler at:")
        for _ in range(workers):
            start("worker", address, "--nthreads", "1", "--no-nanny", until="Registered to:")
        yield address


def parts(folder: Path, address: str) -> dict[str, float]:
    """Seconds for each part of what a sweep does for a cell."""
    from distributed import Client

    found = {}
    sweep = definition(write_nothing(folder / "one"), 2000)
    with closing(Prepared(parse(definition(folder / "one", 10), "s", "s", ""))):
        pass
    began = time.perf_counter()
    prepared = Prepared(parse(sweep, "s", "s", ""))
    found["plan"] = (time.perf_counter() - began) / 2000
    with closing(prepared), closing(Store(str(folder / "parts.sqlite"), "s")) as store:
        job = prepared.plan.jobs[0]
        result = Result("ok", {"figure": 1.0}, None, None, None, "here", 0.0, 1)
        began = time.perf_counter()
        for number in range(2000):
            store.put(f"{number:064x}", {"policy": "A"}, [], result)
        found["store"] = (time.perf_counter() - began) / 2000
        places = prepared.snapshot.places
        inside = 0.0
        prepared.runner.run(job.words, places)
        began = time.perf_counter()
        for _ in range(500):
            inside += prepared.runner.run(job.words, places)["seconds"]
        found["process"] = (time.perf_counter() - began - inside) / 500
        found["cell of one request"] = inside / 500
    make: Any = Client
    with closing(make(address, set_as_default=False)) as client:
        text = json.dumps({"sweep": "none", "jobs": []})
        client.submit(far.run_batch, text, pure=False).result()
        began = time.perf_counter()
        futures = [client.submit(far.run_batch, text, pure=False, key=f"n{n}") for n in range(500)]
        client.gather(futures)
        found["task"] = (time.perf_counter() - began) / 500
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
        found["boot, local"] = seconds_of(boots, folder, workers=given.workers)
        found["nothing, local"] = seconds_of(nothings, folder, workers=given.workers)
        with cluster(given.workers, folder) as address:
            found["boot, Dask"] = seconds_of(boots, folder, scheduler=address)
            found["nothing, Dask"] = seconds_of(nothings, folder, scheduler=address)
            found["parts"] = parts(folder, address)
    for name in ("boot, local", "boot, Dask", "nothing, local", "nothing, Dask"):
        each = 1000 * found[name] / given.cells
        print(f"{name:<16} {found[name]:7.1f} s for {given.cells} cells, {each:.2f} ms each")
    for name, seconds in found["parts"].items():
        print(f"  {name:<20} {1e6 * seconds:7.0f} us")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
