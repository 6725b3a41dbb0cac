"""pytest fixtures for policies' unit tests, there wherever pyvmm is installed.

    def test_quota_refuses_the_second_megabyte(pyvmm_scenario):
        result = pyvmm_scenario("streaming-dma", Quota(1 << 20))
        assert result.figures["shared_bytes_peak"] <= 1 << 20

Nothing of pyvmm is imported before a test asks for a fixture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from vmm.library.machine import Machine
    from vmm.policy import Policy
    from vmm.scenario import Result, Scenario
    from vmm.trace.cost import CostModel

KVM = "/dev/kvm"


class RunScenario(Protocol):
    """What the fixture `pyvmm_scenario` is."""

    def __call__(
        self,
        scenario: Scenario | str | Callable[..., Any],
        *policies: Policy | str,
        seed: int = 0,
        model: CostModel | str | None = None,
        **parameters: Any,
    ) -> Result: ...


class MakeMachine(Protocol):
    """What the fixture `pyvmm_machine` is."""

    def __call__(self, *policies: Policy, **words: Any) -> Machine: ...


@pytest.fixture
def pyvmm_scenario() -> RunScenario:
    """Runs a scenario (a Scenario, a generator function of a guest, or what
    vmm.scenario.load takes) against policies; gives its Result."""
    from vmm.scenario import Scenario, load, run

    def go(
        scenario: Scenario | str | Callable[..., Any],
        *policies: Policy | str,
        seed: int = 0,
        model: CostModel | str | None = None,
        **parameters: Any,
    ) -> Result:
        if isinstance(scenario, str):
            scenario = load(scenario)
        elif not isinstance(scenario, Scenario):
            scenario = Scenario(scenario)
        return run(scenario, policies, seed=seed, model=model, parameters=parameters)

    return go


@pytest.fixture
def pyvmm_machine() -> Iterator[MakeMachine]:
    """Makes real machines on /dev/kvm: `machine = pyvmm_machine(Quota(8 << 20))`, and then
    `machine.run(timeout=60)`. Without a kernel the guest is pyvmm's own payload; private memory
    is on. More words are MachineConfig's and Machine's. They are stopped and closed with the test,
    which is skipped where there is no KVM."""
    why = _no_kvm()
    if why is not None:
        pytest.skip(why)
    from vmm.library.machine import Machine
    from vmm.machine.config import MachineConfig

    with ExitStack() as stack:

        def make(*policies: Policy, **words: Any) -> Machine:
            given: dict[str, Any] = {"private_memory": "auto"}
            given |= {name: words.pop(name) for name in MachineConfig._fields if name in words}
            machine = Machine(MachineConfig(**given), policies=policies, **words)
            return stack.enter_context(machine)

        yield make


def _no_kvm() -> str | None:
    """Why a test that needs KVM can't run here; None where it can."""
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"needs KVM: {KVM}: {error.strerror}; pyvmm lab runs the test where there is one"
    return None
