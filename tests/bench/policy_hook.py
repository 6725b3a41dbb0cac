"""What a policy costs per conversion: no hook against AllowAll, no KVM needed.

    python tests/bench/policy_hook.py [--rounds 30] [--pages 1]

Each round converts the same pages back and forth under either policy, in turn, over two memfds:
validation, page states, the two punched holes and all. What is printed is the difference of the
medians; the hook alone, without a conversion around it, is the second line. The third is what
one access of a device costs, without on_io and under LeastPrivilege with 32 requests under way.
"""

from __future__ import annotations

import argparse
import statistics
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vmm.conversion.schemes.cbit import CbitScheme
from vmm.conversion.transaction import Converter
from vmm.core.events import ConversionRequest, Kind
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.devices.virtio.watched import WatchedMemory, WatchedQueue
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory
from vmm.policy import Policy
from vmm.policy.builtin import AllowAll, LeastPrivilege
from vmm.policy.hooks import Hooks

RAM = 64 << 20
CONVERSIONS = 2000
RINGS, REQUESTS = 0x10_0000, 0x20_0000
QUEUES: list[WatchedQueue] = []


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


def per_access(memory: WatchedMemory | GuestMemory) -> float:
    """Microseconds for a device's read of 16 bytes of shared memory."""
    pread = memory.pread
    start = time.perf_counter_ns()
    for _ in range(CONVERSIONS):
        pread(16, REQUESTS)
    return (time.perf_counter_ns() - start) / CONVERSIONS / 1000


def watched(memory: GuestMemory) -> WatchedMemory:
    """Memory as a device sees it under LeastPrivilege, with 32 requests of 3 buffers under way."""
    hooks = Hooks([LeastPrivilege()])
    announce = hooks.watcher(Converter(memory, CbitScheme(38)).view, "bench")
    assert announce is not None
    made = WatchedMemory(memory, announce)
    size, desc, avail, used = 128, RINGS, RINGS + 0x1000, RINGS + 0x2000
    queue = made.queue(made, size, desc, avail, used)
    for number in range(32):
        for piece in range(3):
            index = 3 * number + piece
            gpa, flags = REQUESTS + 0x1000 * index, 0 if piece == 2 else 1
            memory.pwrite(struct.pack("<QIHH", gpa, 512, flags, index + 1), desc + 16 * index)
        memory.pwrite(struct.pack("<H", 3 * number), avail + 4 + 2 * number)
    memory.pwrite(struct.pack("<HH", 0, 32), avail)
    QUEUES.append(queue)  # it names what it holds for as long as it is there
    assert len(queue.take()) == 32
    return made


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
    memories: dict[str, GuestMemory | WatchedMemory] = {
        "no hook": memory,
        "LeastPrivilege": watched(memory),
    }
    touching: dict[str, list[float]] = {name: [] for name in memories}
    for _ in range(options.rounds):
        for name, converter in converters.items():
            times[name].append(per_conversion(converter, options.pages))
            asking[name].append(per_decision(converter, options.pages))
        for name, seen in memories.items():
            touching[name].append(per_access(seen))
    memory.close()
    for what, figures in (("conversion", times), ("decision", asking), ("access", touching)):
        _, policy = figures
        without, hooked = (statistics.median(each) for each in figures.values())
        print(
            f"{what}: no hook {without:.2f} us, {policy} {hooked:.2f} us, "
            f"difference {hooked - without:.2f} us, ratio {hooked / without:.2f} "
            f"({options.rounds} rounds of {CONVERSIONS}, medians)"
        )


if __name__ == "__main__":
    main()
