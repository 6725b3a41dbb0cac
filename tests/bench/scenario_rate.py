"""Conversions a second that scenarios make, with the real converter and real policies.

    python tests/bench/scenario_rate.py [--rounds 5] [--json FILE]

Each row is one scenario against one stack of policies. `runs`: whole runs, their memory made and
closed, the best and the median. `undisturbed`: the quickest hundred conversions in a row of all
rounds, which other work on the machine hardly touches. One thread, no KVM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.core.ranges import PAGE_SIZE
from vmm.policy import Policy
from vmm.policy.builtin import AllowAll, DeferredDiscard, Quota, RateLimit
from vmm.scenario import Guest, Scenario, Share, Steps, Unshare, Wait, run

CONVERSIONS = 40_000
BATCH = 100
PAGES = 64


def pages(guest: Guest, marks: list[float], pause: float = 0.0) -> Steps:
    """Single pages, shared and unshared in turn, with a pause before each request. `marks` get
    the time after each BATCH conversions."""
    held = [guest.allocate(PAGE_SIZE) for _ in range(PAGES)]
    for number in range(CONVERSIONS // 2):
        area = held[number % PAGES]
        if pause:
            yield Wait(pause)
        yield Share(area)
        if pause:
            yield Wait(pause)
        yield Unshare(area)
        if number % (BATCH // 2) == 0:
            marks.append(time.perf_counter())


STACKS: dict[str, Callable[[], list[Policy]]] = {
    "no policy": list,
    "AllowAll": lambda: [AllowAll()],
    "Quota": lambda: [Quota(64 << 20)],
    "RateLimit": lambda: [RateLimit(1e9, 1 << 30)],
    "DeferredDiscard": lambda: [DeferredDiscard(0.01)],
}


def rates(policies: list[Policy], pause: float) -> tuple[float, float]:
    """Conversions a second of one run, and of its quickest batch."""
    marks: list[float] = []
    start = time.perf_counter()
    run(Scenario(pages), policies, parameters={"marks": marks, "pause": pause})
    took = time.perf_counter() - start
    return CONVERSIONS / took, BATCH / min(b - a for a, b in pairwise(marks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    samples: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name, stack in STACKS.items():
            for pause, words in ((0.0, ""), (1e-5, ", with pauses")):
                samples.setdefault(f"{name}{words}", []).append(rates(stack(), pause))
    print(f"conversions a second, {options.rounds} rounds of {CONVERSIONS:,}:")
    for name, values in samples.items():
        runs, batches = zip(*values, strict=True)
        print(
            f"  {name:30} runs: best {max(runs):7,.0f} median {statistics.median(runs):7,.0f}"
            f"   undisturbed {max(batches):7,.0f}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(samples, indent=1) + "\n")


if __name__ == "__main__":
    main()
