"""Starts and stops machines in one process, and looks at what is left behind.

    python tests/bench/cycles.py [--cycles 200] [--cpus 2]

Each cycle is a whole run of the embedded payload: private memory, a disk, a report. It prints,
every tenth of the way, open fds, threads, mappings of guest memory and vCPUs, and what memory is
held: Python's objects (blocks), the C library's KiB, resident KiB. It exits with 1 unless the first
three are what they were after the first tenth, and memory has hardly grown in the second half: by
less than 10 blocks and 2 KiB a cycle, and by less than two of the pieces of 1 MiB in which Python's
allocator takes its memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from vmm.exits.outcome import POWEROFF
from vmm.machine.config import MachineConfig
from vmm.machine.machine import Machine

BLOCKS_A_CYCLE, KIB_A_CYCLE, RESIDENT_KIB = 10, 2, 2048
"""Growth that is too much. What the samples here take is 2 blocks a cycle."""


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of <malloc.h>."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = _MallInfo


def left_behind() -> dict[str, int]:
    """What this process holds now."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    status = Path("/proc/self/status").read_text()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "mappings": sum(("memfd:" in m or "kvm" in m) and ".so" not in m for m in maps),
        "blocks": sys.getallocatedblocks(),
        "malloc_kib": _mallinfo().uordblks >> 10,
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
    cycles = options.cycles - (len(samples) // 2 + 1) * step
    most = {
        "blocks": BLOCKS_A_CYCLE * cycles,
        "malloc_kib": KIB_A_CYCLE * cycles,
        "resident_kib": RESIDENT_KIB,
    }
    small = all(last[name] - half[name] < size for name, size in most.items())
    return 0 if same and small else 1


if __name__ == "__main__":
    sys.exit(main())
