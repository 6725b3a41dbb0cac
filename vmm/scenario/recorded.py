"""Recordings as scenarios: a stock kernel's requests and accesses, in its own time.

What the kernel does about a refusal is nothing: Linux under SEV doesn't look at the answer of
KVM_HC_MAP_GPA_RANGE (6.1 to 7.3). Its time is its own, though: where answers take longer than on
the recorded host, everything after them comes later. And a device that was refused an access has
stopped; what the kernel asked of it later was never carried out.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vmm.core.ranges import PAGE_SIZE, Range
from vmm.scenario.definition import Scenario, Steps
from vmm.scenario.guest import Guest
from vmm.scenario.recording import SHARE, TO_GUEST, UNSHARE, Recorded, Recording, first_page, parse
from vmm.scenario.steps import Io, Share, Step, Unshare, Wait

_DATA = Path(__file__).with_name("data")
_ENDING = ".json.gz"
BALLOON = "balloon-requests"
"""A recording of an ordinary guest, which converts nothing: a part of the scenario `balloon`."""


def names() -> list[str]:
    """Of the recordings that come with pyvmm."""
    found = {path.name.removesuffix(_ENDING) for path in _DATA.glob(f"*{_ENDING}")}
    return sorted(found - {BALLOON})


@cache
def recording(name: str) -> Recording:
    """One of pyvmm's own. Raises OSError, UsageError."""
    path = _DATA / f"{name}{_ENDING}"
    return parse(path.read_bytes(), path.name)


def scenario_of(name: str, recorded: Recording) -> Scenario:
    """The scenario that plays a recording.

    Its parameters: `pace`, by which the guest's own pauses are multiplied (0: none), and
    `jitter`, up to which part each of them is longer or shorter by chance, so that seeds differ.
    """
    steps = [_step(event) for event in recorded.events]

    def play(guest: Guest, pace: float = 1.0, jitter: float = 0.0) -> Steps:
        stopped: set[str] = set()
        seconds = pace * 1e-6
        for event, step in zip(recorded.events, steps, strict=True):
            if event.pause:
                by_chance = guest.rng.uniform(1 - jitter, 1 + jitter) if jitter else 1.0
                yield Wait(event.pause * seconds * by_chance)
            if type(step) is not Io:
                yield step
            elif step.device not in stopped and (yield step):
                stopped.add(step.device)

    return Scenario(
        play,
        name=name,
        ram=recorded.ram,
        private=_without(recorded.ram, recorded.shared),
        model=recorded.facts.get("host"),
        facts=recorded.facts,
    )


def _step(event: Recorded) -> Step:
    if event.kind in (SHARE, UNSHARE):
        area = Range(event.gpa, event.size - event.size % PAGE_SIZE)
        return Share(area) if event.kind == SHARE else Unshare(area)
    return Io(event.device, first_page(event), is_write=event.kind == TO_GUEST)


def _without(ram: list[Range], holes: list[Range]) -> list[Range]:
    left = list(ram)
    for hole in holes:
        left = [piece for area in left for piece in area.without(hole)]
    return left
