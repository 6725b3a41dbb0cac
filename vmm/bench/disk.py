"""(d) virtio-blk: the bench guest on each data-path engine, and on QEMU with the same disk file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kvm_bindings import floors
from vmm.bench import qemu as yardstick
from vmm.bench.processes import bench_guest, pyvmm, results_of
from vmm.bench.series import Series
from vmm.core.errors import HostError

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
# Some exits at the end: the last test's processor time is read while there is a process still.
_BALLAST = "e2000"
_RESULT = re.compile(r"result (\S+): (\d+) ticks")


def measure(
    disk: Path,
    tests: dict[str, str],
    rounds: int,
    qemu: list[str] | None,
    engines: tuple[str, ...] = ENGINES,
) -> Iterator[Series]:
    """Microseconds a request, for each test, then those of them that the host's threads were on
    a processor, which other work on the machine does not change. A round boots every subject once.

    Raises HostError where a guest can't be run, or says something else than results.
    """
    append = f"-- {' '.join(tests)} {_BALLAST}"
    kernel = bench_guest()
    commands = {
        f"pyvmm {engine}": pyvmm(
            "--kernel", str(kernel), "--mem", "256M", "--append", append,
            "--disk", f"{str(disk).replace(',', ',,')},io={engine}", "--allow-mapped-io",
        )
        for engine in engines
    }  # fmt: skip
    if qemu is not None:
        commands["QEMU"] = yardstick.disk_guest(qemu, kernel, str(disk), append)
    rate = floors.tick_rate()
    taken: dict[str, dict[tuple[str, str], list[float]]] = {"disk": {}, "disk-cpu": {}}
    for one in taken.values():
        one.update({(test, name): [] for test in tests for name in commands})
    for number in range(rounds):
        order = list(commands)
        for name in order if number % 2 == 0 else reversed(order):
            for line, nanoseconds in results_of(commands[name]):
                match = _RESULT.match(line)
                if match is not None and match[1] == _BALLAST:
                    continue
                if match is None or match[1] not in tests:
                    raise HostError(f"the bench guest under {name} answered {line!r}")
                test, count = match[1], int(match[1].rpartition("n")[2])
                taken["disk"][test, name].append(int(match[2]) / rate / count * 1e6)
                taken["disk-cpu"][test, name].append(nanoseconds / count / 1000)
    for section, samples in taken.items():
        for (test, name), values in samples.items():
            yield Series(section, tests[test], name, "us", values)


def fill(disk: Path) -> None:
    """A disk image full of bytes, in the page cache."""
    block = bytes(range(256)) * 4096
    with open(disk, "wb") as file:
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
