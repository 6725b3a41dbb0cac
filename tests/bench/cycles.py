"""Starts and stops machines in one process, and looks at what is left behind.

    python tests/bench/cycles.py [--cycles 200] [--cpus 2]

Each cycle is a whole run of the embedded payload: private memory, a disk, a report. It prints,
every tenth of the way, open fds, threads, mappings of guest memory and vCPUs, and resident memory
in KiB. It exits with 1 unless the first three are what they were after the first tenth, and memory
has grown by less than 1 MiB in the second half (what the allocator keeps for threads goes up and
down by a few hundred KiB).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from vmm.exits.outcome import POWEROFF
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine


def left_behind() -> dict[str, int]:
    """What this process holds now."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    status = Path("/proc/self/status").read_text()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "mappings": sum(("memfd:" in m or "kvm" in m) and ".so" not in m for m in maps),
        "resident_kib": int(status.split("VmRSS:")[1].split()[0]),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    step = max(options.cycles // 10, 1)
    samples: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory() as scratch:
        disk = Path(scratch, "disk")
        disk.write_bytes(bytes(1 << 20))
        config = MachineConfig(
            memory=64 << 20,
            cpus=options.cpus,
            private_memory="auto",
            disks=(str(disk),),
            report=str(Path(scratch, "report.json")),
        )
        console, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # the payload's words
        started = time.monotonic()
        for cycle in range(1, options.cycles + 1):
            outcome = Machine(config).run()
            if outcome.exit != POWEROFF:
                print(f"cycle {cycle}: {outcome}", file=sys.stderr)
                return 1
            if cycle % step == 0:
                samples.append(left_behind())
                words = " ".join(f"{name}={value}" for name, value in samples[-1].items())
                os.write(console, f"{cycle} cycles: {words}\n".encode())
        seconds = time.monotonic() - started
    os.write(console, f"{seconds / options.cycles * 1000:.0f} ms a cycle\n".encode())
    first, half, last = samples[0], samples[len(samples) // 2], samples[-1]
    same = all(last[name] == first[name] for name in ("fds", "threads", "mappings"))
    grown = last["resident_kib"] - half["resident_kib"]
    return 0 if same and grown < 1024 else 1


if __name__ == "__main__":
    sys.exit(main())
