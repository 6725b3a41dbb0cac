"""Conversions a second that scenarios make, with the real converter and real policies.

    python tests/bench/scenario_rate.py [--rounds 5] [--json FILE]

Each row is one scenario against one stack of policies, the best and the median of several rounds:
what a sweep's cell takes is conversions / rate. One thread, no KVM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.core.ranges import PAGE_SIZE
from vmm.policy import Policy
from vmm.policy.builtin import AllowAll, Quota, RateLimit
from vmm.scenario import Guest, Scenario, Share, Steps, Unshare, Wait, load, run

CONVERSIONS = 40_000


def pages(guest: Guest) -> Steps:
    """Single pages, 64 of them shared at a time, each unshared after that."""
    held = [guest.allocate(PAGE_SIZE) for _ in range(64)]
    for number in range(CONVERSIONS // 2):
        area = held[number % 64]
        yield Share(area)
        yield Unshare(area)


def waiting(guest: Guest) -> Steps:
    """As `pages`, with a pause before each request."""
    held = [guest.allocate(PAGE_SIZE) for _ in range(64)]
    for number in range(CONVERSIONS // 2):
        area = held[number % 64]
        yield Wait(1e-5)
        yield Share(area)
        yield Wait(1e-5)
        yield Unshare(area)


STACKS: dict[str, Callable[[], list[Policy]]] = {
    "no policy": list,
    "AllowAll": lambda: [AllowAll()],
    "Quota": lambda: [Quota(64 << 20)],
    "RateLimit": lambda: [RateLimit(1e9, 1 << 30)],
}


def rate(scenario: Scenario, policies: list[Policy]) -> float:
    """Conversions a second of one run, all of it: its memory made and closed."""
    start = time.perf_counter()
    result = run(scenario, policies)
    took = time.perf_counter() - start
    return result.figures["conversions"] / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scenarios = [Scenario(pages), Scenario(waiting), load("streaming-dma")]
    samples: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for scenario in scenarios:
            for name, stack in STACKS.items():
                samples.setdefault(f"{scenario.name}, {name}", []).append(rate(scenario, stack()))
    print(f"conversions a second, {options.rounds} rounds:")
    for name, values in samples.items():
        print(f"  {name:28} best {max(values):9,.0f}   median {statistics.median(values):9,.0f}")
    if options.json is not None:
        options.json.write_text(json.dumps(samples, indent=1) + "\n")


if __name__ == "__main__":
    main()
