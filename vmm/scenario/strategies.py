"""Hypothesis strategies for guests: areas, steps, and whole programs of several vCPUs.

Only this module imports hypothesis, which is an extra of its own: `pip install hypothesis`.
Everything shrinks towards few steps, low addresses, single pages and no pauses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

from vmm.core.ranges import PAGE_SIZE, Range
from vmm.scenario.definition import Scenario, Steps
from vmm.scenario.guest import Guest
from vmm.scenario.retrying import Retry
from vmm.scenario.steps import Discard, Fault, Io, Share, Step, Unshare, Wait

SMALL_RAM = 64 * PAGE_SIZE
"""So little that steps meet: most faults of policies need two requests for one page."""
LARGEST_REQUEST = 1 << 62

Done = Step | Retry


def areas(ram: int = SMALL_RAM, most_pages: int = 16) -> st.SearchStrategy[Range]:
    """Whole pages inside of `ram` bytes."""
    pages = ram // PAGE_SIZE

    def area(pair: tuple[int, int]) -> Range:
        first, count = pair
        return Range(first * PAGE_SIZE, min(count, pages - first) * PAGE_SIZE)

    return st.tuples(st.integers(0, pages - 1), st.integers(1, min(most_pages, pages))).map(area)


def hostile_areas(ram: int = SMALL_RAM) -> st.SearchStrategy[Range]:
    """What a guest may ask for and doesn't get: no RAM, in part or whole, nothing, no pages."""
    starts = st.integers(0, LARGEST_REQUEST) | st.integers(0, 2 * ram)
    counts = st.integers(0, LARGEST_REQUEST // PAGE_SIZE) | st.integers(0, 2 * ram // PAGE_SIZE)
    return st.builds(lambda start, count: Range(start, count * PAGE_SIZE), starts, counts)


def accesses(ram: int = SMALL_RAM) -> st.SearchStrategy[Range]:
    """Bytes inside of `ram`, 64 KiB at most."""
    return st.tuples(st.integers(0, ram - 1), st.integers(1, 1 << 16)).map(
        lambda pair: Range(pair[0], min(pair[1], ram - pair[0]))
    )


def waits(longest: float = 1.0) -> st.SearchStrategy[Wait]:
    """Pauses in whole milliseconds: those that fall together are found, and shrink."""
    return st.integers(0, round(longest * 1000)).map(lambda ms: Wait(ms / 1000))


def steps(
    ram: int = SMALL_RAM,
    *,
    devices: Sequence[str] = ("disk", "net"),
    faults: bool = False,
    hostile: bool = False,
) -> st.SearchStrategy[Step]:
    """One step. `faults`: implicit conversions too, of which a refused one ends the run;
    `hostile`: requests that no kernel would make, too."""
    area = areas(ram)
    asked = area | hostile_areas(ram) if hostile else area
    named = st.sampled_from(["descriptor", "ring", None])
    choices: list[st.SearchStrategy[Step]] = [
        asked.map(Share),
        asked.map(Unshare),
        waits(),
        st.builds(Io, st.sampled_from(list(devices)), accesses(ram), st.booleans(), named),
        area.map(Discard),
    ]
    if faults:
        choices.append(st.builds(Fault, accesses(ram), st.booleans()))
    return st.one_of(choices)


class Program(NamedTuple):
    """What each vCPU of a guest does, one after the other."""

    vcpus: tuple[tuple[Done, ...], ...]
    ram: int

    def scenario(self, name: str = "program") -> Scenario:
        """To be run."""

        def play(guest: Guest) -> Steps:
            for each in self.vcpus[guest.vcpu]:
                if isinstance(each, Retry):
                    yield from each.steps()
                else:
                    yield each

        return Scenario(play, name=name, ram=self.ram, cpus=len(self.vcpus))


def programs(
    ram: int = SMALL_RAM,
    *,
    most_steps: int = 40,
    most_cpus: int = 2,
    faults: bool = False,
    hostile: bool = False,
) -> st.SearchStrategy[Program]:
    """Whole guests; some of their requests are tried again when they are refused."""
    one = steps(ram, faults=faults, hostile=hostile)
    requests = areas(ram).flatmap(lambda area: st.sampled_from([Share(area), Unshare(area)]))
    retries = st.builds(Retry, requests, st.integers(1, 4), st.integers(0, 100).map(_milliseconds))
    done = st.lists(one | retries, max_size=most_steps).map(tuple)
    vcpus = st.lists(done, min_size=1, max_size=most_cpus).map(tuple)
    return st.builds(Program, vcpus, st.just(ram))


def _milliseconds(count: int) -> float:
    return count / 1000
