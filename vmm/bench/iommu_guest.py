"""The bench guest with private memory, on this machine's KVM: its disk bounces, or is lent pages by
a virtual IOMMU. Each run is a process of its own, with one way, and what its tests are is told.

    python -c "..." DISK WAY BACKING REPORT TESTS
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvm_bindings import floors
from vmm.arch import architecture
from vmm.bench.processes import results_of
from vmm.bench.series import Series
from vmm.core.errors import HostError

SECTION, CALLS = "iommu", "iommu-calls"
BACKING = "memfd"
"""Of private memory: the same as shared memory's, so that only the way differs."""
WAYS = {
    "bounced": "b",
    "premapped": "p",
    "grouped": "g",
    "lazy": "l",
    "strict": "s",
}
"""How the disk gets at the guest's bytes, and the letter that says so to the guest. *bounced*: by a
copy, in a bounce buffer of 64 MiB that is shared, without an IOMMU. The others lend: *premapped*
lends a pool once for all, the rest each buffer for its request. *strict* has a kick for the map and
one for the unmap, *lazy* has unmaps that wait for the next map's kick, *grouped* has one kick for
all that a turn of the driver maps and unmaps."""

_SCRIPT = "import sys; from vmm.bench.iommu_guest import main; sys.exit(main(sys.argv[1:]))"
# Some exits at the end: the test's processor time is read while there is a process still.
_BALLAST = "e200"
_RESULT = re.compile(
    r"result (\S+): (\d+) ticks, \d+ notifications, (\d+) idle, (\d+) maps, \d+ unmaps, (\d+) kicks"
)


class Work(NamedTuple):
    """`requests` requests of `size` bytes, `depth` at a time; `kind` as the bench guest has it."""

    kind: str
    size: int
    depth: int
    requests: int

    @property
    def word(self) -> str:
        """What the guest is told, without the way's letter."""
        return f"{self.kind}{self.size}x{self.depth}n{self.requests}"

    @property
    def title(self) -> str:
        size = f"{self.size >> 10} KiB" if self.size < 1 << 20 else f"{self.size >> 20} MiB"
        order = "random" if self.kind[1] == "r" else "sequential"
        verb = "reads" if self.kind[0] == "r" else "writes"
        return f"{size} {order} {verb}, depth {self.depth}"


_COUNTS = {4 << 10: 1500, 64 << 10: 800, 1 << 20: 300}
QUICK = tuple(
    Work("rr", size, depth, _COUNTS[size])
    for size, depth in ((4 << 10, 1), (4 << 10, 32), (64 << 10, 8), (1 << 20, 1), (1 << 20, 32))
)
FULL = (
    *(
        Work(kind, size, depth, count)
        for size, count in _COUNTS.items()
        for depth in (1, 8, 32)
        for kind in ("rr", "rs")
    ),
    Work("wr", 4 << 10, 32, 1500),
    Work("ws", 1 << 20, 8, 300),
)

UNITS = {
    "time": "us",
    "time against bounced": "times",
    "exits": "per request",
    "maps": "per request",
    "vCPU busy": "us",
    "host": "us",
    "exposed, average": "KiB",
    "exposed, peak": "KiB",
    "pieces, at most": "runs",
}
"""Of each request: microseconds as the guest sees it; maps; processor time of the host's other
threads. Exits that wait for pyvmm, which are kicks of the IOMMU's queue (those of the disk's end in
KVM). Microseconds that the vCPU does not wait for the disk, its copies and exits among them. And
what the host could touch for the disk, shared and lent; and into how many runs of pages in equal
state lending has cut memory."""


def command(disk: str, way: str, backing: str, report: str, tests: str) -> list[str]:
    """The words that start a run."""
    return [sys.executable, "-c", _SCRIPT, disk, way, backing, report, tests]


def main(arguments: Sequence[str]) -> int:
    """A run; 0 when the guest has powered off."""
    from vmm.exits.outcome import POWEROFF
    from vmm.machine.config import MachineConfig
    from vmm.machine.machine import Machine

    disk, way, backing, report, tests = arguments
    config = MachineConfig(
        append=f"-- {tests}",
        memory=256 << 20,
        private_memory=backing,
        scheme="cbit",
        disks=(disk.replace(",", ",,"),),
        iommu=way != "bounced",
        report=report,
    )
    outcome = Machine(config, arch=architecture().with_bench_guest()).run()
    return int(outcome.exit != POWEROFF)


def measure(disk: Path, works: Sequence[Work], rounds: int) -> Iterator[Series]:
    """Every way has its turn in each round of each piece of work. Raises HostError where a guest
    can't be run, or says something else than results."""
    rate = floors.tick_rate()
    for work in works:
        samples: dict[tuple[str, str], list[float]] = {}
        for number in range(rounds):
            order = list(WAYS)
            turns = {
                way: turn(disk, way, work, rate)
                for way in (order if number % 2 == 0 else reversed(order))
            }
            for way, told in turns.items():
                told["time against bounced"] = told["time"] / turns["bounced"]["time"]
                for what, value in told.items():
                    samples.setdefault((what, way), []).append(value)
        for what, unit in UNITS.items():
            for way in WAYS:
                case = f"{work.title}: {what}, {unit}"
                if (what, way) in samples:
                    yield Series(SECTION, case, way, unit, samples[what, way])


def turn(disk: Path, way: str, work: Work, rate: int) -> dict[str, float]:
    """One run of one piece of work: what UNITS has of it alone; `rate` is the guest's ticks in a
    second. Raises HostError."""
    word = WAYS[way] + work.word
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as directory:
        report = Path(directory) / "report.json"
        words = command(str(disk), way, BACKING, str(report), f"{word} {_BALLAST}")
        results = results_of(words)
        counts: dict[str, Any] = json.loads(report.read_text())
    line, nanoseconds = results[0]
    match = _RESULT.fullmatch(line)
    if match is None or match[1] != word:
        raise HostError(f"the bench guest ({way}) answered {line!r}")
    moved = counts["io"]["blk0"]["bytes_read"] + counts["io"]["blk0"]["bytes_written"]
    if moved != work.size * work.requests:
        raise HostError(f"the disk moved {moved} bytes, not {work.requests} times {work.size}")
    ticks, idle, maps, kicks = map(int, match.groups()[1:])
    a_us = rate / 1e6 * work.requests
    shared = counts["conversions"]["share"]["bytes"]
    lending = counts.get("iommu")
    if counts["pages"].get("lent_bytes"):
        raise HostError(f"pages are lent still when the guest ({way}) has ended")
    told = {
        "time": ticks / a_us,
        "exits": kicks / work.requests,
        "maps": maps / work.requests,
        "vCPU busy": (ticks - idle) / a_us,
        "host": nanoseconds / work.requests / 1000,
        "exposed, average": shared / 1024,
        "exposed, peak": shared / 1024,
    }
    if lending is not None:
        told["exposed, average"] += lending["average_lent_bytes"] / 1024
        told["exposed, peak"] += lending["peak_lent_bytes"] / 1024
        told["pieces, at most"] = lending["peak_runs"]
    return told


CALLS_AT_ONCE = 200
"""How many of each in a sample."""


def measure_calls(disk: Path, samples: int) -> Iterator[Series]:
    """A page that is mapped for the disk and unmapped, beside one that is shared and unshared by
    the doorbell, by one guest in turns; each is one exit. Raises HostError."""
    words = [f"c{CALLS_AT_ONCE}", f"m{CALLS_AT_ONCE}"]
    turns = [words if number % 2 else words[::-1] for number in range(samples + 1)]
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as directory:
        report = Path(directory) / "report.json"
        tests = " ".join(word for turn in turns for word in turn)
        lines = [
            line
            for line, _ in results_of(command(str(disk), "strict", BACKING, str(report), tests))
        ]
        counts: dict[str, Any] = json.loads(report.read_text())
    told = [match for match in map(_RESULT.fullmatch, lines) if match is not None]
    if [match[1] for match in told] != tests.split():
        raise HostError(f"the bench guest (strict) answered {lines[:3]!r}")
    conversions = counts["conversions"]
    if conversions["share"]["failed"] or conversions["unshare"]["failed"]:
        raise HostError(f"conversions have failed: {conversions}")
    a_us = floors.tick_rate() / 1e6 * CALLS_AT_ONCE
    times: dict[str, list[float]] = {word: [] for word in words}
    for match in told[len(words) :]:  # those before have imported what they need
        times[match[1]].append(int(match[2]) / a_us)
    shared, lent = (times[word] for word in words)
    yield Series(CALLS, "both calls, us", "shared and unshared", "us", shared)
    yield Series(CALLS, "both calls, us", "mapped and unmapped", "us", lent)
    ratios = [one / other for one, other in zip(lent, shared, strict=True)]
    yield Series(
        CALLS, "against sharing, times", "shared and unshared", "times", [1.0] * len(ratios)
    )
    yield Series(CALLS, "against sharing, times", "mapped and unmapped", "times", ratios)
