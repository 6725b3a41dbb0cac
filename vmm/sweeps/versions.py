"""What has to be the same on every machine of a sweep."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
from collections.abc import Iterable
from pathlib import Path


@functools.cache
def pyvmm_version() -> str:
    """The version that is installed."""
    return _version("pyvmm")


@functools.cache
def dask_version() -> str:
    """Of the part that schedules; its protocol changes with it."""
    return _version("distributed")


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def code_digest() -> str:
    """Of pyvmm's own sources: two machines with one version may still run different ones."""
    root = Path(__file__).resolve().parents[1]
    return _digest(root, root.rglob("*.py"))


_ROOMS = ("core", "memory", "policy", "conversion", "trace", "replay", "scenario")


@functools.cache
def figures_digest() -> str:
    """Of what figures come from: the converter, replay, scenarios with their recordings. Not of the
    built-in policies, which count one by one."""
    root = Path(__file__).resolve().parents[1]
    builtin = root / "policy" / "builtin"
    files = (path for room in _ROOMS for path in (root / room).rglob("*"))
    wanted = (path for path in files if path.suffix in (".py", ".gz", ".json"))
    return _digest(root, (path for path in wanted if builtin not in path.parents))


def _digest(root: Path, files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path.relative_to(root)}\0".encode())
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def described() -> dict[str, str]:
    """This process: versions, and where it runs."""
    return {
        "pyvmm": pyvmm_version(),
        "code": code_digest(),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
    }
