"""What a policy costs per conversion: no hook against AllowAll, no KVM needed.

    python tests/bench/policy_hook.py [--rounds 30] [--pages 1]

Each round converts the same pages back and forth under either policy, in turn, over two memfds:
validation, page states, the two punched holes and all. What is printed is the difference of the
medians; the hook alone, without a conversion around it, is the second line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory
from vmm.policy import Policy
from vmm.policy.builtin import AllowAll

RAM = 64 << 20
CONVERSIONS = 2000


def per_conversion(converter: Converter, pages: int) -> float:
    """Microseconds for one of CONVERSIONS shares and unshares."""
    gpa = RAM // 2
    requests = [
        ConversionRequest(kind, gpa, pages, 0, "bench") for kind in (Kind.SHARE, Kind.UNSHARE)
    ]
    convert = converter.convert
    start = time.perf_counter_ns()
    for number in range(CONVERSIONS):
        convert(requests[number & 1])
    return (time.perf_counter_ns() - start) / CONVERSIONS / 1000


def per_decision(converter: Converter, pages: int) -> float:
    """Microseconds for asking, without a conversion."""
    area = Range(RAM // 2, pages * PAGE_SIZE)
    decide, view = converter.hooks.decide, converter.view
    start = time.perf_counter_ns()
    for _ in range(CONVERSIONS):
        decide(Kind.SHARE, area, 0, "bench", view)
    return (time.perf_counter_ns() - start) / CONVERSIONS / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a policy hook costs.")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pages", type=int, default=1)
    options = parser.parse_args()
    memory = GuestMemory(
        [Range(0, RAM)], MemfdBacking(RAM), MemfdBacking(RAM), [Range(RAM // 2, RAM // 2)]
    )
    converters = {
        "no hook": Converter(memory, CbitScheme(38), Policy()),
        "AllowAll": Converter(memory, CbitScheme(38), AllowAll()),
    }
    times: dict[str, list[float]] = {name: [] for name in converters}
    asking: dict[str, list[float]] = {name: [] for name in converters}
    for _ in range(options.rounds):
        for name, converter in converters.items():
            times[name].append(per_conversion(converter, options.pages))
            asking[name].append(per_decision(converter, options.pages))
    memory.close()
    for what, figures in (("conversion", times), ("decision", asking)):
        without, hooked = (statistics.median(figures[name]) for name in converters)
        print(
            f"{what}: no hook {without:.2f} us, AllowAll {hooked:.2f} us, "
            f"difference {hooked - without:.2f} us, ratio {hooked / without:.2f} "
            f"({options.rounds} rounds of {CONVERSIONS}, medians)"
        )


if __name__ == "__main__":
    main()
