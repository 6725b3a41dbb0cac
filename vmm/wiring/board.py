"""What the generic wiring needs of an architecture's board, and what a board is made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvm_bindings import Vm
    from vmm.core.event_loop import EventLoop
    from vmm.core.lean_typing import Protocol
    from vmm.core.saved import Saved, State
    from vmm.devices.bus import MemoryBus, PortBus
    from vmm.devices.pci import PciBus
    from vmm.memory.backing import Backing
    from vmm.wiring.interrupts import Lines, Routes

    class SerialPort(Protocol):
        """The receiving side of the board's UART."""

        def receive(self, data: bytes) -> int: ...
        def can_receive(self) -> bool: ...

    class Board(Protocol):
        """An architecture's buses and fixed devices, connected to KVM."""

        ports: PortBus
        registers: MemoryBus
        pci: PciBus
        has_ports: bool
        """Whether the guest has I/O ports."""
        coalesces_output: bool
        """Whether KVM keeps back what the guest writes to the serial port's transmitter."""

        @property
        def serial(self) -> SerialPort:
            """Where the console is."""
            ...

        def press_power_button(self) -> bool:
            """Ask the guest to power off; False where it does not listen."""
            ...

        def state(self) -> State:
            """What a snapshot keeps of the fixed devices. Raises NotSaved."""
            ...

        def restore(self, saved: Saved) -> None:
            """Be in that state. Raises BadState."""
            ...

        def put_forward(self, nanoseconds: int) -> None:
            """The guest was away for so long: its clocks go on from then."""
            ...

        def slot(self, number: int) -> Slot:
            """The PCI slot 1 to 31."""
            ...

        def message_routes(self, private: Backing | None) -> Routes | None:
            """Where interrupt messages are routed; None where functions can't have them, besides
            the INTx that all have. `private` is behind the guest's private memory, if any."""
            ...


class BoardParts:
    """What a board is made with. `opened` closes what it opens.

    `output` takes the serial port's bytes; `room` is called when the guest has read what it had,
    so that more input may go to the serial port.
    """

    __slots__ = ("lines", "loop", "opened", "output", "power_off", "reset", "room", "vm")

    def __init__(
        self,
        vm: Vm,
        loop: EventLoop,
        lines: Lines,
        opened: ExitStack,
        *,
        output: Callable[[bytes], None],
        room: Callable[[], None],
        power_off: Callable[[], None],
        reset: Callable[[], None],
    ) -> None:
        self.vm = vm
        self.loop = loop
        self.lines = lines
        self.opened = opened
        self.output = output
        self.room = room
        self.power_off = power_off
        self.reset = reset


class Slot:
    """How a PCI slot of bus 0 is laid out before the guest changes anything.

    `gsi` is where INTA of the function in it leads, `interrupt_line` what firmware would have left
    in that register. The function's registers are in a BAR at `registers_base`, of I/O ports or
    of memory, the MSI-X table in one at `msix_base`.
    """

    __slots__ = ("gsi", "interrupt_line", "msix_base", "registers_base", "registers_in_io")

    def __init__(
        self,
        gsi: int,
        *,
        interrupt_line: int,
        registers_in_io: bool,
        registers_base: int,
        msix_base: int,
    ) -> None:
        self.gsi = gsi
        self.interrupt_line = interrupt_line
        self.registers_in_io = registers_in_io
        self.registers_base = registers_base
        self.msix_base = msix_base
