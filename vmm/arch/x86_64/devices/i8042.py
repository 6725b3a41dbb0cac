"""The keyboard controller that is not there, apart from the reset line it also has on a PC.

Without it `reboot` and a kernel's last resort have no way out, and an unclaimed port 0x64 reads
0xff, which says "busy": Linux polls that 65,536 times before every reset.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.arch.x86_64.devices.byte_ports import ABSENT, BytePorts
from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

DATA, SYSTEM_CONTROL_B, COMMAND = 0, 1, 4  # offsets from port 0x60

# Commands 0xf0..0xff pulse the output port's low bits, those that are zero in the command;
# bit 0 is the processor's reset line (0xfe is the customary command).
PULSE, PULSE_MASK, NO_RESET = 0xF0, 0xF0, 1 << 0

PORT_B_WRITABLE = 0x03  # timer 2 gate and speaker
PORT_B_TIMER2_OUT = 0x20  # high: the timer has expired, for code that polls for that


class I8042(BytePorts):
    """Ports 0x60-0x64: no data, never busy; `reset` is called when the guest pulses the line."""

    __slots__ = ("_port_b", "_reset")

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._port_b = 0

    def state(self) -> State:
        """See vmm.core.saved.Stateful."""
        return {"port_b": self._port_b}

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful."""
        self._port_b = saved.number("port_b", PORT_B_WRITABLE)

    def read_byte(self, offset: int) -> int:
        if offset in (DATA, COMMAND):
            return 0
        if offset == SYSTEM_CONTROL_B:
            return self._port_b | PORT_B_TIMER2_OUT
        return ABSENT

    def write_byte(self, offset: int, value: int) -> None:
        if offset == SYSTEM_CONTROL_B:
            self._port_b = value & PORT_B_WRITABLE
        elif offset == COMMAND and value & PULSE_MASK == PULSE and not value & NO_RESET:
            self._reset()
