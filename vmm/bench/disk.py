"""(d) virtio-blk: the bench guest on each data-path engine, and on QEMU with the same disk file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import firmware
from kvm_bindings import floors
from vmm.bench import qemu as yardstick
from vmm.bench.processes import output_of, pyvmm
from vmm.bench.series import Series

ENGINES = ("auto", "pread", "fd2fd", "mmap")
QUICK_TESTS = {
    "rr4096x1n1000": "4 KiB random reads, depth 1",
    "rr4096x32n12000": "4 KiB random reads, depth 32",
    "rs131072x8n1200": "128 KiB sequential reads, depth 8",
    "rs1048576x4n300": "1 MiB sequential reads, depth 4",
    "wr4096x32n12000": "4 KiB random writes, depth 32",
    "ws131072x8n1200": "128 KiB sequential writes, depth 8",
    "ws1048576x4n300": "1 MiB sequential writes, depth 4",
}
TESTS = {
    **QUICK_TESTS,
    "rr4096x8n8000": "4 KiB random reads, depth 8",
    "rr4096x64n12000": "4 KiB random reads, depth 64",
    "rs131072x1n1200": "128 KiB sequential reads, depth 1",
    "rs131072x32n1200": "128 KiB sequential reads, depth 32",
    "rs1048576x1n300": "1 MiB sequential reads, depth 1",
    "rs1048576x16n300": "1 MiB sequential reads, depth 16",
    "rs1048576x64n300": "1 MiB sequential reads, depth 64",
    "wr4096x1n1000": "4 KiB random writes, depth 1",
    "ws1048576x16n300": "1 MiB sequential writes, depth 16",
}
DISK_BYTES = 128 << 20
_RESULT = re.compile(r"^result (\S+): (\d+) ticks", re.MULTILINE)


def measure(
    disk: Path, tests: dict[str, str], rounds: int, qemu: list[str] | None
) -> Iterator[Series]:
    """Microseconds a request, for each test; every round boots every subject once.

    Raises HostError where a guest can't be run, or says something else than results.
    """
    append = f"-- {' '.join(tests)}"
    kernel = firmware.bench_path()
    commands = {
        f"pyvmm {engine}": pyvmm(
            "--kernel", str(kernel), "--mem", "256M", "--append", append,
            "--disk", f"{str(disk).replace(',', ',,')},io={engine}", "--allow-mapped-io",
        )
        for engine in ENGINES
    }  # fmt: skip
    if qemu is not None:
        commands["QEMU"] = yardstick.disk_guest(qemu, kernel, str(disk), append)
    rate = floors.tick_rate()
    samples: dict[tuple[str, str], list[float]] = {
        (test, name): [] for test in tests for name in commands
    }
    for number in range(rounds):
        order = list(commands)
        for name in order if number % 2 == 0 else reversed(order):
            for test, ticks in _RESULT.findall(output_of(commands[name])):
                count = int(test.rpartition("n")[2])
                samples[test, name].append(int(ticks) / rate / count * 1e6)
    for (test, name), taken in samples.items():
        yield Series("disk", tests[test], name, "us", taken)


def fill(disk: Path) -> None:
    """A disk image full of bytes, in the page cache."""
    block = bytes(range(256)) * 4096
    with open(disk, "wb") as file:
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
