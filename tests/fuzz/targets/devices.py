"""Each virtio device, attacked by its driver, by a second vCPU and from its host's end."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.fuzz.attacked import DEVICES, QUICK, SLOW, FailingHost, attacked
from tests.fuzz.drawing import Choices, recorded
from tests.fuzz.hostile_driver import CANARY
from tests.fuzz.oracles import TurnCost, assert_holds_little
from tests.fuzz.targets.registry import scratch_folder, target
from vmm.memory import transfer

_LIVES = 3
_STEPS = 60
_MOVES = 40
_HARMLESS = b"\xff\xff\0"
"""A host that works, no second vCPU, a driver that keeps the rules."""


def _live(name: str, choices: Choices) -> None:
    # This thread's own for ever, made when a transfer first needs them.
    transfer._scratches.own.pipe_ends()
    transfer._scratches.own.bounce()
    before = len(os.listdir("/proc/self/fd"))
    with scratch_folder() as folder, ExitStack() as stack:
        fails, another = choices.random() < 0.2, choices.random() < 0.2
        host = FailingHost(choices, stack) if fails else None
        step = SLOW if fails else QUICK
        with attacked(name, choices, Path(folder), step) as (device, driver):
            TurnCost(driver.machine)
            driver.second_vcpu, driver.most_moves = another, _MOVES
            for _ in range(_LIVES):
                if choices.spent:
                    break
                if host is not None:
                    host.on = True
                try:
                    driver.episode(_STEPS)
                finally:
                    if host is not None:
                        host.on = False
                assert_holds_little(driver.machine)
                assert CANARY not in device.came_out(), "private memory came out"
            driver.memory.check()
    transfer._scratches.own.pipe_ends()  # a transfer that failed has dropped it
    assert len(os.listdir("/proc/self/fd")) == before, "the device keeps a file open"


def _add(name: str) -> None:
    def live(choices: Choices) -> None:
        _live(name, choices)

    def seeds() -> list[bytes]:
        well_behaved = [recorded(live, seed, first=_HARMLESS) for seed in range(4)]
        return [*well_behaved, *(recorded(live, seed) for seed in range(100, 104))]

    def run(data: bytes) -> None:
        live(Choices(data))

    put: Callable[[Callable[[bytes], None]], object] = target(name, seeds, runs=20)
    put(run)


for _name in DEVICES:
    _add(_name)
