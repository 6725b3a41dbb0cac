"""One package per architecture behind one protocol; nothing outside imports one by its name."""

from __future__ import annotations

import importlib
import os

from vmm.core.errors import HostError
from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.arch.protocol import Architecture

ARCHITECTURES = ("x86_64", "aarch64")
"""Those that pyvmm knows, as `uname -m` says them."""


def architecture(name: str | None = None) -> Architecture:
    """The architecture of that name; by default this machine's, whose guests KVM can run.

    Raises HostError for one that pyvmm doesn't know.
    """
    name = name or os.uname().machine
    if name not in ARCHITECTURES:
        raise HostError(
            f"this machine is {name}, which pyvmm doesn't know; use {' or '.join(ARCHITECTURES)}"
        )
    found: Architecture = importlib.import_module(f"vmm.arch.{name}.architecture").ARCHITECTURE
    return found
