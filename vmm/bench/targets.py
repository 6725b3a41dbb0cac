"""What the data path and the run loop are held to: ratios of speeds in one interleaved run."""

from __future__ import annotations

from typing import NamedTuple

from vmm.bench.series import Ratio, Series, find, speed_ratio


class Target(NamedTuple):
    """`subject` is to be at least `wanted` times as fast as `against`."""

    section: str
    case: str
    subject: str
    against: str
    wanted: float


TARGETS = (
    Target("disk", "4 KiB random reads, depth 32", "pyvmm auto", "QEMU", 1.0),
    Target("disk", "4 KiB random writes, depth 32", "pyvmm auto", "QEMU", 1.1),
    Target("disk", "1 MiB sequential reads, depth 4", "pyvmm auto", "QEMU", 1.0),
    Target("disk", "1 MiB sequential writes, depth 4", "pyvmm auto", "QEMU", 1.0),
    Target("disk", "1 MiB sequential writes, depth 16", "pyvmm auto", "QEMU", 1.0),
    Target("disk-cpu", "4 KiB random reads, depth 1", "pyvmm auto", "QEMU", 1 / 1.3),
    Target("disk", "128 KiB sequential reads, depth 8", "pyvmm fd2fd", "pyvmm pread", 1.15),
    Target("transfers", "file to memory 64 KiB", "fd2fd", "pread", 1.15),
    Target("transfers", "file to memory 128 KiB", "fd2fd", "pread", 1.15),
    Target("exits", "OUT to a device", "run loop", "C loop", 0.6),
    Target("start-up", "exec to first instruction", "pyvmm", "QEMU microvm", 1.0),
    Target("linux", "boot to the prompt", "pyvmm auto", "QEMU", 1.0),
    Target("linux", "boot to the prompt", "pyvmm --private-mem auto", "QEMU", 1 / 1.1),
)


class Verdict(NamedTuple):
    target: Target
    ratio: Ratio

    @property
    def reached(self) -> bool:
        return self.ratio.median >= self.target.wanted


def verdicts(series: list[Series]) -> list[Verdict]:
    """The targets for which both sides were measured."""
    found = []
    for target in TARGETS:
        ours = find(series, target.section, target.case, target.subject)
        theirs = find(series, target.section, target.case, target.against)
        if ours is not None and theirs is not None:
            found.append(Verdict(target, speed_ratio(ours, theirs)))
    return found
