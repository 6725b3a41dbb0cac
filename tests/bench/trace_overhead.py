"""What `--trace` costs a stock kernel's boot in the lab: with and without, interleaved.

    python tests/bench/trace_overhead.py [--kernel debian:6.12] [--rounds 4] [--json FILE]

Each round boots four times with --private-mem in one lab machine, from exec to the shell's prompt:
untraced, traced, traced, untraced. Prints medians, spread, their ratio, and how many events a
traced boot had. Boots on a busy machine say little, so the parts are measured as well, in the same
lab machine: what tracing adds before the guest runs, what an event adds, what a flush does (on a
thread of its own, twice a second). The least of several runs of each counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.boot_time import boot_seconds
from tests.bench.in_lab import run_in_lab

UNTRACED, TRACED = "untraced", "traced"


def inner(kernel: str, initrd: str, rounds: int) -> None:
    """Runs inside the lab machine; a JSON line with all samples goes to stdout."""
    folder = Path(tempfile.mkdtemp())
    disk, trace = folder / "disk.img", folder / "trace"
    disk.touch()
    os.truncate(disk, 16 << 20)
    command = [sys.executable, "-sP", "/lab/project/pyvmm", "--kernel", kernel, "--initrd", initrd]
    command += ["--append", "quiet", "--disk", str(disk), "--private-mem"]
    words = {UNTRACED: command, TRACED: [*command, "--trace", str(trace)]}
    samples: dict[str, list[float]] = {name: [] for name in words}
    events: list[int] = []
    for number in range(rounds):
        for name in (UNTRACED, TRACED, TRACED, UNTRACED):
            samples[name].append(boot_seconds(words[name])[0])
            print(f"round {number + 1}: {name} {samples[name][-1]:.2f} s", file=sys.stderr)
            if name == TRACED:
                rows = (trace / "kind" / "shape.ninja").read_bytes()
                events.append(int.from_bytes(rows, "little"))
    costs = [_costs_in_a_process() for _ in range(8)]
    least = {name: min(cost[name] for cost in costs) for name in costs[0]}
    print(json.dumps({"samples": samples, "events": events, "costs": least}))


def _costs_in_a_process() -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.trace_overhead", "--costs"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def costs() -> dict[str, float]:
    """Seconds for each part of tracing, in this process, which has imported none of it."""
    import vmm.machine.machine  # noqa: F401  # an untraced run has this
    from kvm_bindings.exits import IoExit
    from tests.support.fake_vcpu import FakeVcpu
    from vmm.machine.config import MachineConfig

    folder = tempfile.mkdtemp()
    start = time.perf_counter()
    from vmm.machine.tracing import RunTrace

    trace = RunTrace(f"{folder}/trace", MachineConfig())
    table = trace.exits({IoExit: ("io", lambda vcpu, exit: None)})
    trace._recorder.start()
    before_the_guest = time.perf_counter() - start
    vcpu, exit, handle = FakeVcpu(), IoExit(0x3F8, 1, 1, True, b"x"), table[IoExit][1]
    event = flush = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(500):
            handle(vcpu, exit)
        event = min(event, (time.perf_counter() - start) / 500)
        start = time.perf_counter()
        trace._recorder.flush()
        flush = min(flush, time.perf_counter() - start)
    trace.close()
    return {"before_the_guest": before_the_guest, "event": event, "flush": flush}


def outer(kernel_name: str, rounds: int, json_file: Path | None) -> None:
    """Runs on the host: boots the lab machine, prints the table."""
    result = run_in_lab("tests.bench.trace_overhead", kernel_name, rounds)
    report(kernel_name, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def report(kernel_name: str, result: dict[str, Any]) -> None:
    """Medians with their spread, the overhead, and a check on it that outliers don't reach."""
    samples = result["samples"]
    print(f"{kernel_name}, --private-mem, exec to shell prompt inside the lab, seconds:")
    for name, values in samples.items():
        print(
            f"  {name:9} median {statistics.median(values):6.2f}  min {min(values):6.2f}"
            f"  max {max(values):6.2f}  n={len(values)}"
        )
    for what, of in (("medians", statistics.median), ("minima", min)):
        overhead = of(samples[TRACED]) / of(samples[UNTRACED]) - 1
        print(f"  overhead by {what}: {100 * overhead:+.1f} %")
    events, parts = statistics.median(result["events"]), result["costs"]
    boot = min(samples[UNTRACED])
    flushes = 2 * boot
    added = parts["before_the_guest"] + events * parts["event"] + flushes * parts["flush"]
    print(
        f"  parts: {1e3 * parts['before_the_guest']:.0f} ms before the guest runs, "
        f"{events:.0f} events of {1e6 * parts['event']:.0f} us, "
        f"{flushes:.0f} flushes of {1e3 * parts['flush']:.1f} ms: "
        f"{1e3 * added:.0f} ms, {100 * added / boot:.1f} % of the quickest untraced boot"
    )


def main() -> None:
    if sys.argv[1:2] == ["--costs"]:
        print(json.dumps(costs()))
        return
    if sys.argv[1:2] == ["--inner"]:
        inner(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="debian:6.12")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    outer(options.kernel, options.rounds, options.json)


if __name__ == "__main__":
    main()
