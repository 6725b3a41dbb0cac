"""Scenarios: what a guest does, as a Python generator that reacts to the answers it gets.

`run` puts them to the converter that runs guests, over memory that is only a model: no KVM, no
kernel. For tests of policies, and for trying them on many guests in little time.
"""

from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.scenario.definition import Scenario, ScenarioError, Steps, scenario
    from vmm.scenario.guest import Guest
    from vmm.scenario.library import load, names
    from vmm.scenario.retrying import Retry
    from vmm.scenario.running import Ended, Result, run
    from vmm.scenario.steps import Discard, Fault, Io, Share, Step, Unshare, Wait

__all__ = [
    "Discard",
    "Ended",
    "Fault",
    "Guest",
    "Io",
    "Result",
    "Retry",
    "Scenario",
    "ScenarioError",
    "Share",
    "Step",
    "Steps",
    "Unshare",
    "Wait",
    "load",
    "names",
    "run",
    "scenario",
]

_MODULES = {
    "Ended": "running",
    "Guest": "guest",
    "Result": "running",
    "Retry": "retrying",
    "Scenario": "definition",
    "ScenarioError": "definition",
    "Steps": "definition",
    "load": "library",
    "names": "library",
    "run": "running",
    "scenario": "definition",
}


def __getattr__(name: str) -> object:
    """One of `__all__`, imported when it is asked for: the pytest plugin is in this room, and
    costs a user's test run nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'steps')}"), name)
