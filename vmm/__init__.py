"""pyvmm: a userspace virtual machine monitor for guest private memory.

What is named here is for programs: `from vmm import Machine, MachineConfig`. The command and all of
pyvmm's own code import what they need from its rooms, so that a start pays for nothing else.
"""

# Not vmm.core.lean_typing's: nothing may be imported before vmm.__main__ has seen to Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.core.errors import (
        AccessDenied,
        GuestFailure,
        GuestMemoryError,
        HostError,
        OutputError,
        PrivateAccess,
        PyvmmError,
        UnmappedAccess,
        UsageError,
    )
    from vmm.core.events import Kind
    from vmm.core.ranges import Range
    from vmm.exits.outcome import Outcome
    from vmm.library.machine import Machine, NotRunning
    from vmm.machine.config import MachineConfig
    from vmm.memory.guest_memory import PageState
    from vmm.policy import Policy, PolicyError

__all__ = [
    "AccessDenied",
    "GuestFailure",
    "GuestMemoryError",
    "HostError",
    "Kind",
    "Machine",
    "MachineConfig",
    "NotRunning",
    "Outcome",
    "OutputError",
    "PageState",
    "Policy",
    "PolicyError",
    "PrivateAccess",
    "PyvmmError",
    "Range",
    "UnmappedAccess",
    "UsageError",
]

_ROOMS = {
    "Kind": "vmm.core.events",
    "Machine": "vmm.library.machine",
    "MachineConfig": "vmm.machine.config",
    "NotRunning": "vmm.library.machine",
    "Outcome": "vmm.exits.outcome",
    "PageState": "vmm.memory.guest_memory",
    "Policy": "vmm.policy",
    "PolicyError": "vmm.policy",
    "Range": "vmm.core.ranges",
}


def __getattr__(name: str) -> object:
    """One of `__all__`, imported when a program asks for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ROOMS.get(name, "vmm.core.errors")), name)
