"""What has to be the same on every machine of a sweep."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
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
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
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
