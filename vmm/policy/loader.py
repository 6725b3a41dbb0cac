"""Finds the class that an option names: MODULE:CLASS, FILE.py:CLASS, or the name of an entry point;
a policy's above all."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from vmm.core.errors import UsageError
from vmm.core.given import Unusable, open_given
from vmm.core.lean_typing import Any
from vmm.policy.protocol import Policy

_FILE_MODULE = "pyvmm_user_policy"
"""What a policy file's module is called. The name stands for the file loaded last."""

_MOST_SOURCE = 16 << 20


def load_policy(spec: str, words: Sequence[str] = ()) -> Policy:
    """An instance of the class that `spec` names, made with the NAME=VALUE `words`.

    Raises UsageError saying what is wrong.
    """
    found = load_named("--policy", "pyvmm.policies", spec)
    name = spec.rpartition(":")[2]
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UsageError(f"--policy {spec}: {name} is not a subclass of vmm.policy.Policy")
    from vmm.policy.arguments import bind, require_hooks  # a run without policies does without

    try:
        policy = found(**bind(found, words, load_policy))
        require_hooks(policy)
    except UsageError as error:
        raise UsageError(f"--policy {spec}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"--policy {spec}: {name}() failed: {error!r}") from error
    return policy


def load_named(option: str, group: str, spec: str) -> Any:
    """What `spec` names: a module's or a file's attribute, or the entry point of that name in
    `group`. Raises UsageError, which begins with `option`."""
    place, colon, name = spec.rpartition(":")
    is_file = place.endswith(".py")
    if not colon and all(part.isidentifier() for part in name.split("-")):
        from vmm.core.plugins import find_registered, registered  # most are named by their place

        found = find_registered(option, group, name)
        if found is None:
            there = registered(group)
            also = f", or one of {', '.join(there)}" if there else ""
            raise UsageError(f"{option} {spec}: write MODULE:CLASS or FILE.py:CLASS{also}")
        return found
    if not name or not (is_file or all(part.isidentifier() for part in place.split("."))):
        raise UsageError(f"{option} {spec}: write MODULE:CLASS or FILE.py:CLASS")
    what = f"{option} {spec}"
    module = _load_file(what, place) if is_file else _load_module(what, place)
    found = getattr(module, name, None)
    if found is None:
        raise UsageError(f"{what}: {place} has no class {name}")
    return found


def _load_module(what: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{what}: no module {error.name} on Python's path; to load a file, write FILE.py:CLASS"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what}: importing {name} failed: {_reason(error)}") from error


def _load_file(what: str, path: str) -> ModuleType:
    try:
        os.close(open_given(path, path, "give FILE.py", most=_MOST_SOURCE))
    except Unusable as error:
        raise UsageError(f"{what}: loading {path} failed: it {error.reason}") from error
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        # For the modules beside it. At the end, so that none of them stands in for one of ours.
        sys.path.append(folder)
    location = importlib.util.spec_from_file_location(_FILE_MODULE, path)
    assert location is not None and location.loader is not None  # a .py file always has one
    module = importlib.util.module_from_spec(location)
    # As import does it: dataclasses look their module up there to read annotations.
    sys.modules[_FILE_MODULE] = module
    try:
        location.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[_FILE_MODULE]
        raise UsageError(f"{what}: loading {path} failed: {_reason(error)}") from error
    return module


def _reason(error: BaseException) -> str:
    """A sentence about an error; a file's or a syntax error's own is better than its repr."""
    if isinstance(error, OSError | SyntaxError):
        return str(error)
    return repr(error)
