"""What a scenario is: a generator function, and the guest that it wants."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from vmm.core.errors import UsageError
from vmm.core.near import did_you_mean
from vmm.core.ranges import PAGE_SIZE, Range
from vmm.policy.arguments import converted, described
from vmm.scenario.guest import Guest
from vmm.scenario.steps import Step

Steps = Generator[Step, int, None]
"""What a scenario's function returns; for its annotation."""

MOST_CPUS = 64
MOST_RAM = 1 << 40
DEFAULT_RAM = 256 << 20


class ScenarioError(UsageError):
    """A scenario that can't be run: one line that names it, the step, and what is wrong there."""


class Scenario:
    """A guest's behaviour, and what it has: RAM, what of it is private at the start, vCPUs."""

    def __init__(
        self,
        function: Callable[..., Steps],
        *,
        name: str | None = None,
        ram: int | Sequence[Range] = DEFAULT_RAM,
        private: Sequence[Range] | None = None,
        cpus: int = 1,
        model: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """`function(guest, **parameters)` is called once for each vCPU. `ram` in bytes, or where
        it is; `private`: what starts private, by default all. `model`: the host kind whose costs
        are taken where `run` is told none.

        Raises ScenarioError.
        """
        self.function = function
        self.name: str = name or str(getattr(function, "__name__", "scenario"))
        self.ram = _checked_ram(self.name, ram)
        self.private = self.ram if private is None else tuple(private)
        self.cpus = cpus
        self.model = model
        self.facts = dict(facts or {})
        """Where it comes from, for people: of a recorded one, of what kernel and workload."""
        if not inspect.isgeneratorfunction(inspect.unwrap(function)):
            raise ScenarioError(
                f"scenario {self.name}: {function!r} yields nothing; write a generator function "
                "of the guest, as in `def boot(guest): yield Share(guest.allocate(4096))`"
            )
        if not isinstance(cpus, int) or not 1 <= cpus <= MOST_CPUS:
            raise ScenarioError(f"scenario {self.name}: cpus={cpus!r}: use 1 to {MOST_CPUS}")
        for area in self.private:
            if not any(each.contains(area) for each in self.ram):
                raise ScenarioError(f"scenario {self.name}: private={area}, which is no RAM of it")

    def __repr__(self) -> str:
        return f"<Scenario {self.name}>"

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What can be given to it by name."""
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found = list(inspect.signature(self.function).parameters.items())[1:]
        return {name: each for name, each in found if each.kind in named}

    def bound(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for the function. Text becomes what the parameter's annotation says,
        as with a policy's arguments. Raises ScenarioError."""
        known = self.parameters
        for name in given:
            if name not in known:
                remedy = did_you_mean(name, list(known)) or (
                    f"it takes {', '.join(known) or 'none at all'}"
                )
                raise ScenarioError(f"scenario {self.name} has no parameter {name}; {remedy}")
        missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
        if missing:
            raise ScenarioError(f"scenario {self.name} needs a value for {', '.join(missing)}")
        try:
            hints = typing.get_type_hints(inspect.unwrap(self.function)) if given else {}
        except Exception as error:
            raise ScenarioError(
                f"scenario {self.name}: its parameters' types: {error!r}"
            ) from error
        return {name: self._value(name, value, hints.get(name)) for name, value in given.items()}

    def _value(self, name: str, value: Any, wanted: Any) -> Any:
        if not isinstance(value, str) or wanted in (None, Any):
            return value
        try:
            return converted(value, wanted)
        except (ValueError, OverflowError):
            raise ScenarioError(
                f"scenario {self.name}: {name}={value}: it wants {described(wanted)}"
            ) from None

    def start(self, guest: Guest, given: Mapping[str, Any]) -> Steps:
        """The steps of one vCPU. `given` as `bound` has it. Raises ScenarioError."""
        try:
            return self.function(guest, **given)
        except TypeError as error:  # a generator function runs nothing yet: it is what it takes
            raise ScenarioError(f"scenario {self.name} is called with a guest: {error}") from error


def scenario(
    *,
    name: str | None = None,
    ram: int | Sequence[Range] = DEFAULT_RAM,
    private: Sequence[Range] | None = None,
    cpus: int = 1,
    model: str | None = None,
) -> Callable[[Callable[..., Steps]], Scenario]:
    """Makes a Scenario of a generator function: `@scenario(ram=64 << 20)`. See Scenario."""

    def make(function: Callable[..., Steps]) -> Scenario:
        made = Scenario(function, name=name, ram=ram, private=private, cpus=cpus, model=model)
        made.__doc__ = function.__doc__
        return made

    return make


def _checked_ram(name: str, ram: int | Sequence[Range]) -> tuple[Range, ...]:
    areas = (Range(0, ram),) if isinstance(ram, int) else tuple(Range(*each) for each in ram)
    end = 0
    for area in areas:
        aligned = not (area.start | area.size) % PAGE_SIZE
        if not aligned or area.size <= 0 or area.start < end or area.end > MOST_RAM:
            raise ScenarioError(
                f"scenario {name}: ram={area}: give whole 4 KiB pages below {MOST_RAM >> 30} GiB, "
                "in ascending order"
            )
        end = area.end
    if not areas:
        raise ScenarioError(f"scenario {name} has no RAM; give ram=256 << 20")
    return areas
