"""What an exit of a micro-guest costs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

from vmm.host.probes.finding import Finding, broken, yes

_EXITS = 300


def exit_latency(is_served: Callable[[], bool], what: str) -> Finding:
    """What an exit costs from guest to here and back, in this process. `is_served` has the guest
    make the next one, and says whether it did; `what` they are, for people."""
    times = [time.perf_counter()]
    while len(times) <= _EXITS and is_served():
        times.append(time.perf_counter())
    if len(times) <= _EXITS:
        return broken("guest stops", f"a guest made {len(times) - 1} of {_EXITS} exits")
    each = [(after - before) * 1e6 for before, after in itertools.pairwise(times)]
    median = statistics.median(each)
    return yes(
        f"{median:.0f} us an exit",
        f"median of {len(each)} {what}, {min(each):.0f} to {max(each):.0f} us",
        microseconds=round(median, 1),
        exits=len(each),
    )
