"""Finds the policy class that `--policy MODULE:CLASS` or `--policy FILE.py:CLASS` names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from vmm.core.errors import UsageError
from vmm.policy.protocol import Policy

_FILE_MODULE = "pyvmm_user_policy"
"""What a policy file's module is called; a run has one policy."""


def load_policy(spec: str) -> Policy:
    """An instance of the class that `spec` names. Raises UsageError saying what is wrong."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"--policy {spec}: write MODULE:CLASS or FILE.py:CLASS")
    module = _load_file(spec, place) if place.endswith(".py") else _load_module(spec, place)
    found = getattr(module, name, None)
    if found is None:
        raise UsageError(f"--policy {spec}: {place} has no class {name}")
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UsageError(f"--policy {spec}: {name} is not a subclass of vmm.policy.Policy")
    try:
        return found()
    except Exception as error:
        raise UsageError(f"--policy {spec}: {name}() failed: {error!r}") from error


def _load_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"--policy {spec}: importing {name} failed: {error!r}") from error


def _load_file(spec: str, path: str) -> ModuleType:
    location = importlib.util.spec_from_file_location(_FILE_MODULE, path)
    assert location is not None and location.loader is not None  # a .py file always has one
    module = importlib.util.module_from_spec(location)
    # As import does it: dataclasses look their module up there to read annotations.
    sys.modules[_FILE_MODULE] = module
    try:
        location.loader.exec_module(module)
    except Exception as error:
        del sys.modules[_FILE_MODULE]
        raise UsageError(f"--policy {spec}: loading {path} failed: {error!r}") from error
    return module
