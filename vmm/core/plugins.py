"""Finds what an installed distribution registers for pyvmm, by entry point.

Imported only for a name that isn't one of pyvmm's own: importlib.metadata takes longer to import
than KVM takes to make a VM.
"""

from __future__ import annotations

from importlib import metadata

from vmm.core.errors import UsageError
from vmm.core.lean_typing import Any

POLICIES, DEVICES, EXITS = "pyvmm.policies", "pyvmm.devices", "pyvmm.exits"
SCHEMES, BACKINGS = "pyvmm.schemes", "pyvmm.backings"


def registered(group: str) -> list[str]:
    """The names in an entry-point group."""
    return sorted({point.name for point in metadata.entry_points(group=group)})


def find_registered(option: str, group: str, name: str) -> Any:
    """What is registered under the name; None where nothing is.

    Raises UsageError, which begins with `option`, where it can't be imported.
    """
    for point in metadata.entry_points(group=group, name=name):
        try:
            return point.load()
        except (Exception, SystemExit) as error:
            whose = "" if point.dist is None else f" of {point.dist.name}"
            raise UsageError(
                f"{option} {name}: its entry point{whose}, {point.value}, failed: {error!r}"
            ) from error
    return None
