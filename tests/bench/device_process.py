"""A disk in a process of its own against one in pyvmm's: the bench guest's reads and writes.

    python -m tests.bench.device_process [ROUNDS] [--disk FILE]

Each round boots the guest once on either, in alternating order. Microseconds a request, medians,
and the median of the rounds' ratios: how quick the disk in a process is, times the other.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

from kvm_bindings import floors
from vmm.bench import disk as disk_bench
from vmm.bench.processes import bench_guest, pyvmm, results_of

TESTS = {
    "rs1048576x4n300": "1 MiB sequential reads, depth 4",
    "ws1048576x4n300": "1 MiB sequential writes, depth 4",
    "rr4096x32n12000": "4 KiB random reads, depth 32",
    "wr4096x32n12000": "4 KiB random writes, depth 32",
    "rs1048576x1n300": "1 MiB sequential reads, depth 1",
    "rr4096x1n1000": "4 KiB random reads, depth 1",
}
PLACES = {"in pyvmm": "", "in a process": ",process"}
_RESULT = re.compile(r"result (\S+): (\d+) ticks")


def measure(
    disk: Path, rounds: int, tests: dict[str, str]
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """For each test the microseconds a request of every round, by place."""
    rate = floors.tick_rate()
    taken: dict[str, dict[str, list[float]]] = {
        test: {place: [] for place in PLACES} for test in tests
    }
    name = str(disk).replace(",", ",,")
    for number in range(rounds):
        order = list(PLACES) if number % 2 == 0 else list(reversed(PLACES))
        for place in order:
            words = pyvmm(
                "--kernel", str(bench_guest()), "--mem", "256M", "--append",
                f"-- {' '.join(tests)} e2000", "--disk", name + PLACES[place],
            )  # fmt: skip
            for line, _ in results_of(words):
                match = _RESULT.match(line)
                if match is not None and match[1] in tests:
                    count = int(match[1].rpartition("n")[2])
                    taken[match[1]][place].append(int(match[2]) / rate / count * 1e6)
    yield from taken.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=8)
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--tests", type=int, default=len(TESTS), help="only so many of them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        disk = arguments.disk or Path(folder, "disk.img")
        disk_bench.fill(disk)
        print(f"{'':<34}{'in pyvmm':>10}{'process':>10}   ratio (quartiles)")
        for test, places in measure(
            disk, arguments.rounds, dict([*TESTS.items()][: arguments.tests])
        ):
            here, there = places.values()
            ratios = [one / other for one, other in zip(here, there, strict=True)]
            low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            print(
                f"{TESTS[test]:<34}{median(here):>10.1f}{median(there):>10.1f}"
                f"   {middle:.2f} ({low:.2f}..{high:.2f})"
            )


if __name__ == "__main__":
    main()
