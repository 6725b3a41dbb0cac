"""What the generic wiring needs of an architecture's board, and what a board is made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmm.devices.bus import MemoryBus, PortBus

if TYPE_CHECKING:
    from kvm_bindings import Vm
    from vmm.core.event_loop import EventLoop
    from vmm.devices.pci import PciBus
    from vmm.memory.backing import Backing
    from vmm.wiring.interrupts import Lines, Routes


class SerialPort(Protocol):
    """The receiving side of the board's UART."""

    def receive(self, data: bytes) -> int: ...
    def can_receive(self) -> bool: ...


class BoardParts(NamedTuple):
    """What a board is made with. `opened` closes what it opens."""

    vm: Vm
    loop: EventLoop
    lines: Lines
    opened: ExitStack
    output: Callable[[bytes], None]
    """Where the serial port's bytes go."""
    room: Callable[[], None]
    """Called when the guest has read what it had: more input may go to the serial port."""
    power_off: Callable[[], None]
    reset: Callable[[], None]


class Slot(NamedTuple):
    """How a PCI slot of bus 0 is laid out before the guest changes anything."""

    gsi: int
    """Where INTA of the function in it leads."""
    interrupt_line: int
    """What firmware would have left in the Interrupt Line register."""
    registers_in_io: bool
    """Whether the function's registers are in an I/O BAR; else in memory."""
    registers_base: int
    msix_base: int


class Board(Protocol):
    """An architecture's buses and fixed devices, connected to KVM."""

    ports: PortBus
    registers: MemoryBus
    pci: PciBus

    @property
    def serial(self) -> SerialPort:
        """Where the console is."""
        ...

    def press_power_button(self) -> bool:
        """Ask the guest to power off; False where it does not listen."""
        ...

    def slot(self, number: int) -> Slot:
        """The PCI slot 1 to 31."""
        ...

    def message_routes(self, private: Backing | None) -> Routes | None:
        """Where interrupt messages are routed; None where functions can't have them, besides
        the INTx that all have. `private` is behind the guest's private memory, if any."""
        ...
