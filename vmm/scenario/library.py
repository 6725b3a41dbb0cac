"""The scenarios that come with pyvmm, and those of a user's file or trace."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import closing

from vmm.core.errors import UsageError
from vmm.core.given import Unusable, open_given
from vmm.core.near import did_you_mean
from vmm.scenario import recorded
from vmm.scenario.definition import Scenario, ScenarioError

_FILE_MODULE = "pyvmm_user_scenario"
_MOST_SOURCE = 16 << 20


def names() -> list[str]:
    """The names of pyvmm's own scenarios."""
    return sorted([*_generated(), *recorded.names()])


def load(spec: str) -> Scenario:
    """One of pyvmm's own scenarios by its name; FILE.py:NAME, a Scenario of that file or a
    generator function of a guest; or the folder of a trace, whose guest then reacts.

    Raises ScenarioError saying what is wrong, UsageError for a trace that can't be read.
    """
    if os.path.isdir(spec):
        return _of_trace(spec)
    place, colon, name = spec.rpartition(":")
    if colon:
        return _of_file(spec, place, name)
    generated = _generated()
    if spec in generated:
        return generated[spec]
    if spec in recorded.names():
        return recorded.scenario_of(spec, recorded.recording(spec))
    known = names()
    remedy = did_you_mean(spec, known) or f"there are {', '.join(known)}"
    raise ScenarioError(f"no scenario {spec}; {remedy}; for one of yours write FILE.py:NAME")


def _generated() -> dict[str, Scenario]:
    from vmm.scenario import generated

    return {each.name: each for each in generated.ALL}


def _of_trace(path: str) -> Scenario:
    from vmm.scenario.recording import of_trace
    from vmm.trace.reader import Trace

    with closing(Trace(path)) as trace:
        facts = {"kernel": trace.facts.get("kernel"), "host": path}
        return recorded.scenario_of(path, of_trace(trace, facts))


def _of_file(spec: str, path: str, name: str) -> Scenario:
    found = _from_file(spec, path, name)
    if isinstance(found, Scenario):
        return found
    if not callable(found):
        raise ScenarioError(f"{spec}: {name} is {found!r}, no generator function of a guest")
    return Scenario(found, name=name)


def _from_file(spec: str, path: str, name: str) -> object:
    try:
        os.close(open_given(path, path, "give FILE.py:NAME", most=_MOST_SOURCE))
    except Unusable as error:
        raise ScenarioError(f"{spec}: loading {path} failed: it {error.reason}") from error
    except UsageError as error:
        raise ScenarioError(f"{spec}: {error}") from error
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.append(folder)  # for the modules beside it, behind all of ours
    location = importlib.util.spec_from_file_location(_FILE_MODULE, path)
    if location is None or location.loader is None:
        raise ScenarioError(f"{spec}: {path} is no Python file; its name has to end in .py")
    module = importlib.util.module_from_spec(location)
    sys.modules[_FILE_MODULE] = module  # dataclasses look their module up there
    try:
        location.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[_FILE_MODULE]
        why = str(error) if isinstance(error, OSError | SyntaxError) else repr(error)
        raise ScenarioError(f"{spec}: loading {path} failed: {why}") from error
    found: object = getattr(module, name, None)
    if found is None:
        raise ScenarioError(f"{spec}: {path} has nothing named {name}")
    return found
