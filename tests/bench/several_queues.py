"""What several queues of a disk bring: requests a second by threads, and by processes beside them.

Run: python -m tests.bench.several_queues [--seconds N] [--size BYTES]

N queues of one disk in one guest's memory, a thread for each, as `queues=N` has them; then N disks
in a process each, which share nothing but the host's processors and the file. The queues are
always full (32 random reads), and no guest runs: what is measured is the device's side alone, so
that the processes are what this many processors could do, and the threads what one interpreter
lets them do. Prints, asserts nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from tests.bench.loop_latency import MIB, Ram
from tests.support.fake_memory import FakeMemory
from tests.support.virtio_driver import DESC_NEXT, DESC_WRITE
from tests.support.virtio_machine import VirtioMachine
from vmm.devices.virtio.block import VirtioBlock
from vmm.devices.virtio.block_file import open_disk

DEPTH = 32
DISK_BYTES = 128 << 20


class Disk:
    """A disk with `queues` queues, each full of reads of `size` bytes."""

    def __init__(self, path: Path, queues: int, size: int) -> None:
        device = VirtioBlock(open_disk(f"{path},queues={queues},share=on"), patience=0)
        self.machine = VirtioMachine(device, memory=cast(FakeMemory, Ram()))
        self.machine.up(size=256)
        for number in range(queues):
            self._fill(number, size)

    def _fill(self, number: int, size: int) -> None:
        machine, queue = self.machine, self.machine.queues[number]
        for i in range(DEPTH):
            sector = random.randrange((DISK_BYTES - size) // 4096) * 8
            header = machine.place(struct.pack("<IIQ", 0, 0, sector))
            status = machine.room(1)
            data = 64 * MIB + (DEPTH * number + i) * size
            queue.descriptor(3 * i, header.gpa, 16, DESC_NEXT, 3 * i + 1)
            queue.descriptor(3 * i + 1, data, size, DESC_NEXT | DESC_WRITE, 3 * i + 2)
            queue.descriptor(3 * i + 2, status, 1, DESC_WRITE, 0)
        queue.offer(*(3 * i for i in range(DEPTH)))

    def turn(self, number: int) -> int:
        """Serve what is there and offer it again; how many requests it was."""
        queue = self.machine.queues[number]
        self.machine.transport.notify(number)
        done = (queue.used_index() - queue.seen) & 0xFFFF
        queue.seen = queue.used_index()
        queue.available = (queue.available + done) & 0xFFFF
        queue.set_available_index(queue.available)
        return done


def served(turn: Callable[[int], int], number: int, seconds: float) -> int:
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        count += turn(number)
    return count


def by_threads(path: Path, count: int, size: int, seconds: float) -> float:
    """Requests a second."""
    disk, found = Disk(path, count, size), [0] * count

    def run(number: int) -> None:
        found[number] = served(disk.turn, number, seconds)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    disk.machine.close()
    return sum(found) / seconds


def _one_process(path: Path, size: int, seconds: float) -> int:
    return served(Disk(path, 1, size).turn, 0, seconds)


def by_processes(path: Path, count: int, size: int, seconds: float) -> float:
    """Requests a second."""
    with multiprocessing.get_context("fork").Pool(count) as pool:
        jobs = [(path, size, seconds)] * count
        return sum(pool.starmap(_one_process, jobs, chunksize=1)) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what several queues bring.")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args()
    ways = {"threads": by_threads, "processes": by_processes}
    taken: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk"
        block = bytes(range(256)) * 4096
        with path.open("wb") as file:
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
        for _ in range(options.rounds):
            for count in (1, 2, 4):
                for way, measure in ways.items():
                    rate = measure(path, count, options.size, options.seconds)
                    taken.setdefault((way, count), []).append(rate)
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"{options.size} bytes, {os.cpu_count()} processors, GIL {'on' if gil else 'off'}")
    one = statistics.median(taken["threads", 1])
    for (way, count), rates in taken.items():
        rate = statistics.median(rates)
        print(f"{count} {way:10} {rate:10,.0f} requests a second, {rate / one:.2f} of one thread's")


if __name__ == "__main__":
    main()
