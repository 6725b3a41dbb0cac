"""Scenarios written as programs: guests that no stock kernel is, but that policies meet."""

from __future__ import annotations

import errno

from vmm.core.ranges import Range
from vmm.scenario.guest import Guest
from vmm.scenario.scenario import Scenario, Steps, scenario
from vmm.scenario.steps import Io, Share, Unshare, Wait

KIB, MIB = 1 << 10, 1 << 20


@scenario(name="streaming-dma", ram=256 * MIB)
def streaming_dma(
    guest: Guest, requests: int = 2000, size: int = 64 * KIB, pace: float = 0.0005, slots: int = 16
) -> Steps:
    """A driver that shares each buffer for as long as the device has it.

    Where a share is refused it tries again twice, a little later each time; then it takes one of
    `slots` bounce slots, which it shared at the start, and loses the time of the copy.
    """
    bounce: list[Range] = []
    for _ in range(slots):
        area = guest.allocate(size)
        if (yield Share(area)) == 0:
            bounce.append(area)
    for _ in range(requests):
        yield Wait(guest.rng.expovariate(1 / pace))
        buffer = guest.allocate(size)
        answer = yield Share(buffer)
        for delay in (0.001, 0.01):
            if answer not in (-errno.EAGAIN, -errno.EBUSY):
                break
            yield Wait(delay)
            answer = yield Share(buffer)
        if answer == 0:
            yield Io("disk", buffer, is_write=True)
            yield Unshare(buffer)
        elif bounce:
            yield Io("disk", guest.rng.choice(bounce), is_write=True)
            yield Wait(size / 4e9)  # copied at 4 GB/s
        guest.free(buffer)


ALL: tuple[Scenario, ...] = (streaming_dma,)
