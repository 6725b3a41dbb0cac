"""x86's exit handlers over whatever a test has, as the platform puts them together."""

from __future__ import annotations

from collections.abc import Callable

from vmm.arch import architecture
from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.doorbells import PORT_NAME
from vmm.arch.x86_64.exits import X86ExitHandlers
from vmm.arch.x86_64.msrs import MsrTable
from vmm.conversion.transaction import Converter
from vmm.devices.bus import MemoryBus, PortBus
from vmm.devices.doorbell import doorbell
from vmm.exits.doorbell import doorbell_actions
from vmm.exits.outcome import Outcome
from vmm.memory.guest_memory import GuestMemory

X86 = architecture("x86_64")


def exit_handlers(
    memory: GuestMemory,
    converter: Converter,
    stop: Callable[[Outcome], None],
    *,
    ports: PortBus | None = None,
    registers: MemoryBus | None = None,
    msrs: MsrTable | None = None,
    vcpus: int = 2,
    private: bool = True,
) -> X86ExitHandlers:
    """With the doorbell on the port bus; without `private` an ordinary VM's."""
    ports = ports or PortBus()
    actions = doorbell_actions(memory, converter if private else None, stop)
    ring = doorbell(vcpus, PORT_NAME, actions)
    ports.add(layout.DOORBELL_PORT, layout.DOORBELL_PORTS, ring)
    return X86ExitHandlers(
        ports, registers or MemoryBus(), msrs or MsrTable(private), converter, stop
    )
