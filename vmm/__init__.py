"""pyvmm: a userspace virtual machine monitor for guest private memory.

What is named here is for programs: `from vmm import Machine, MachineConfig`. The command and all of
pyvmm's own code import what they need from its rooms, so that a start pays for nothing else.
"""

# Not vmm.core.lean_typing's: nothing may be imported before vmm.__main__ has seen to Ctrl-C.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.conversion.events import Changed, Lost, MachineEvent, Noted, Requested
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
    from vmm.core.own_code import ExtensionError
    from vmm.core.ranges import Range
    from vmm.devices.own import PciDevice, PortDevice
    from vmm.devices.virtio.own import VirtioDevice
    from vmm.exits.outcome import Outcome
    from vmm.exits.own import ExitHandler
    from vmm.library.events import Events
    from vmm.library.machine import Machine, NotRunning
    from vmm.machine.config import MachineConfig
    from vmm.machine.report_keys import Report
    from vmm.memory.guest_memory import PageState
    from vmm.policy import Policy, PolicyError
    from vmm.sweeps.api import sweep

__all__ = [
    "AccessDenied",
    "Changed",
    "Events",
    "ExitHandler",
    "ExtensionError",
    "GuestFailure",
    "GuestMemoryError",
    "HostError",
    "Kind",
    "Lost",
    "Machine",
    "MachineConfig",
    "MachineEvent",
    "NotRunning",
    "Noted",
    "Outcome",
    "OutputError",
    "PageState",
    "PciDevice",
    "Policy",
    "PolicyError",
    "PortDevice",
    "PrivateAccess",
    "PyvmmError",
    "Range",
    "Report",
    "Requested",
    "UnmappedAccess",
    "UsageError",
    "VirtioDevice",
    "sweep",
]

_ROOMS = {
    "Changed": "vmm.conversion.events",
    "Events": "vmm.library.events",
    "ExitHandler": "vmm.exits.own",
    "ExtensionError": "vmm.core.own_code",
    "Kind": "vmm.core.events",
    "Lost": "vmm.conversion.events",
    "Machine": "vmm.library.machine",
    "MachineConfig": "vmm.machine.config",
    "MachineEvent": "vmm.conversion.events",
    "NotRunning": "vmm.library.machine",
    "Noted": "vmm.conversion.events",
    "Outcome": "vmm.exits.outcome",
    "PageState": "vmm.memory.guest_memory",
    "PciDevice": "vmm.devices.own",
    "Policy": "vmm.policy",
    "PolicyError": "vmm.policy",
    "PortDevice": "vmm.devices.own",
    "Range": "vmm.core.ranges",
    "Report": "vmm.machine.report_keys",
    "Requested": "vmm.conversion.events",
    "VirtioDevice": "vmm.devices.virtio.own",
    "sweep": "vmm.sweeps.api",
}


def __getattr__(name: str) -> object:
    """One of `__all__`, imported when a program asks for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ROOMS.get(name, "vmm.core.errors")), name)
