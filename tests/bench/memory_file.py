"""How fast guest memory is as a file: pread of 1 MiB and 4 KiB by another process, beside
GuestMemory's own.

    python -m tests.bench.memory_file

Both are taken in turns, a round each; the figure is the median of the rounds' ratios. Needs
/dev/fuse and libfuse3.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from vmm.control.memory_file.guest_file import GuestFile
from vmm.control.memory_file.mount import MemoryMount
from vmm.control.memory_file.place import Place
from vmm.core.event_loop import EventLoop
from vmm.core.ranges import Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory

RAM = 64 << 20
ROUNDS = 15
SIZES = {1 << 20: 64, 4096: 1000}
"""Bytes of a read, and how many of them are a round."""

READER = """
import os, sys, time
path, span = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDONLY)
for line in sys.stdin:
    size, count = map(int, line.split())
    began = time.perf_counter_ns()
    for at in range(count):
        if len(os.pread(fd, size, at * size % span)) != size:
            raise SystemExit("a short read")
    print((time.perf_counter_ns() - began) / count, flush=True)
"""


def own(memory: GuestMemory, size: int, count: int) -> float:
    """Nanoseconds of one GuestMemory.pread."""
    began = time.perf_counter_ns()
    for at in range(count):
        memory.pread(size, at * size % RAM)
    return (time.perf_counter_ns() - began) / count


def main() -> None:
    memory = GuestMemory([Range(0, RAM)], MemfdBacking(RAM))
    memory.pwrite(bytes(range(256)) * (RAM // 256), 0)
    loop = EventLoop()
    with tempfile.TemporaryDirectory() as folder:
        mount = MemoryMount(Place(f"{folder}/m"), GuestFile(memory), lambda _: None, print)
        mount.start(loop, lambda changed: None)
        served = threading.Thread(target=loop.run, daemon=True)
        served.start()
        words = [sys.executable, "-c", READER, os.path.join(folder, "m", "memory"), str(RAM)]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as reader:
            assert reader.stdin is not None and reader.stdout is not None
            for size, count in SIZES.items():
                here, there, ratios = [], [], []
                for _ in range(ROUNDS):
                    here.append(own(memory, size, count))
                    reader.stdin.write(f"{size} {count}\n")
                    there.append(float(reader.stdout.readline()))
                    ratios.append(here[-1] / there[-1])
                print(
                    f"pread of {size:>7}: GuestMemory {statistics.median(here) / 1000:.1f} us, "
                    f"the file {statistics.median(there) / 1000:.1f} us, "
                    f"ratio {statistics.median(ratios):.2f}"
                )
            reader.stdin.close()
        mount.close()
        loop.stop()
        served.join()
    loop.close()
    memory.close()


if __name__ == "__main__":
    main()
