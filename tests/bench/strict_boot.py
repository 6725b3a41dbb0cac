"""How long a stock kernel takes to its shell, strict and as a rehearsal, interleaved in one lab.

    python tests/bench/strict_boot.py [--kernel debian:6.12] [--rounds 3] [--cpus 1]

Each round boots the same kernel, initrd and command line four times, from exec to the shell's
prompt: strict, the rehearsal, the rehearsal, strict. A first boot of each isn't counted: it reads
the files in. Prints medians with their spread, and the ratio of each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.in_lab import at_prompt, run_in_lab

LIMIT = 240.0
WAYS = {"strict": "guest_memfd", "rehearsal": "guest_memfd-mmap"}


def inner(kernel: str, initrd: str, rounds: int, cpus: int) -> None:
    """Runs inside the lab machine; a JSON line with all samples goes to stdout."""

    def boot(way: str) -> float:
        words = [sys.executable, "-sP", "/lab/project/pyvmm", f"--private-mem={WAYS[way]}"]
        words += ["--kernel", kernel, "--initrd", initrd, "--append", "quiet"]
        started = time.monotonic()
        with at_prompt([*words, "--mem", "256M", "--cpus", str(cpus)], LIMIT):
            seconds = time.monotonic() - started
        print(f"{way} {seconds:.2f} s", file=sys.stderr)
        return seconds

    for way in WAYS:
        boot(way)
    samples: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        first, second, third, fourth = (
            boot(way) for way in ("strict", "rehearsal", "rehearsal", "strict")
        )
        samples["strict"].append([first, fourth])
        samples["rehearsal"].append([second, third])
    print(json.dumps(samples))


def report(samples: dict[str, list[list[float]]]) -> None:
    """Medians, smallest and largest, and the ratio of each round's sums."""
    for way, rounds in samples.items():
        values = [seconds for pair in rounds for seconds in pair]
        print(
            f"  {way:10} median {statistics.median(values):6.2f}  min {min(values):6.2f}  "
            f"max {max(values):6.2f}  n={len(values)}"
        )
    ratios = [
        sum(strict) / sum(rehearsal)
        for strict, rehearsal in zip(samples["strict"], samples["rehearsal"], strict=True)
    ]
    spread = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"  strict takes {statistics.median(ratios):.2f} times as long (rounds: {spread})")


def main() -> None:
    if sys.argv[1:2] == ["--inner"]:
        inner(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="debian:6.12")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=1)
    options = parser.parse_args()
    samples = run_in_lab(
        "tests.bench.strict_boot",
        options.kernel,
        options.rounds,
        options.cpus,
        cpus=1 if options.cpus > 1 else None,
        host="experimental",
    )
    print(f"{options.kernel}, {options.cpus} vCPU, exec to shell prompt inside the lab, seconds:")
    report(samples)


if __name__ == "__main__":
    main()
