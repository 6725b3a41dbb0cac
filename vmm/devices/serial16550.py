"""A 16550A UART: console output as it is written, host input with back-pressure.

The line is infinitely fast: the transmitter is always empty, whatever the divisor says. The
interrupt is an edge on a latch that remembers one (an ISA line). So an edge is sent when a cause
appears, and again whenever the guest has dealt with one cause and another is left. A handler that
serves one cause per interrupt still sees them all.
Host input waits until the guest listens: until the receive interrupt can reach it, or it polls
for input. A driver empties the receiver when it starts, and with it what came before its time.
Registers and bits: TI PC16550D data sheet; names as in Linux's serial_reg.h.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock

from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

PORTS = 8
FIFO_DEPTH = 16

# Register offsets. 0 and 1 are the divisor latch while LCR_DLAB is set.
RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(PORTS)

IER_RECEIVE, IER_TRANSMIT, IER_LINE, IER_MODEM = 0x01, 0x02, 0x04, 0x08
IIR_NONE, IIR_MODEM, IIR_TRANSMIT, IIR_RECEIVE, IIR_LINE, IIR_TIMEOUT = 1, 0, 2, 4, 6, 0x0C
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVE = 0x01, 0x02
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_READY, LSR_OVERRUN, LSR_IDLE = 0x01, 0x02, 0x60
MSR_CTS, MSR_DSR, MSR_RING, MSR_CARRIER = 0x10, 0x20, 0x40, 0x80
MSR_DELTAS, MSR_DELTA_RING = 0x0F, 0x04

_TRIGGER_LEVELS = (1, 4, 8, 14)
_POLLS = 16
"""Reads of LSR in a row, with nothing sent between, by which a guest polls for input. Who waits
for the transmitter needs one, and drivers that try out what is there a few."""


class Serial16550:
    """The UART as a port device of 8 ports.

    `output(bytes)` gets what the guest prints, `interrupt()` sends one edge, `room()` tells the
    host side that a `receive` which was cut short is worth repeating. All three are called
    without the device's lock held, on whichever thread made the access that caused them.
    """

    __slots__ = (
        "_divisor",
        "_fifo_enabled",
        "_ier",
        "_interrupt",
        "_lcr",
        "_line_errors",
        "_listens",
        "_lock",
        "_mcr",
        "_modem_deltas",
        "_output",
        "_polls",
        "_received",
        "_room",
        "_scratch",
        "_starved",
        "_transmit_cause",
        "_trigger",
    )

    def __init__(
        self,
        output: Callable[[bytes], None],
        interrupt: Callable[[], None],
        room: Callable[[], None] | None = None,
    ) -> None:
        self._output = output
        self._interrupt = interrupt
        self._room = room
        self._lock = Lock()
        self._received: deque[int] = deque()
        self._starved = False  # a receive() was cut short since room() was last called
        self._ier = 0
        self._lcr = 0
        self._mcr = 0
        self._scratch = 0
        self._divisor = 12  # 9600 baud, what firmware leaves behind
        self._fifo_enabled = False
        self._trigger = 1
        self._line_errors = 0
        self._modem_deltas = 0
        self._listens = False  # from when on it stays so: console output masks IER at times
        self._polls = 0  # reads of LSR in a row, before that
        self._transmit_cause = False  # "holding register empty" not yet acknowledged

    # --- the guest's side ---

    def read(self, offset: int, size: int) -> int:
        """IN: the UART is one byte wide, so a wider access reads the following registers."""
        if size == 1:
            # Once for each character, no lock needed.
            if offset == LSR and self._listens and not self._line_errors:
                return LSR_IDLE | LSR_READY if self._received else LSR_IDLE
            return self._read_register(offset)
        value = 0
        for i in range(size):
            value |= self._read_register(offset + i) << (8 * i)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """OUT: a wider access writes the following registers, lowest byte first."""
        if size == 1:
            self._write_register(offset, value & 0xFF)
            return
        for i in range(size):
            self._write_register(offset + i, (value >> (8 * i)) & 0xFF)

    def write_bytes(self, data: bytes) -> None:
        """What `rep outsb` to the first port does with `data`, in one go."""
        if not data:
            return
        if self._lcr & LCR_DLAB or self._mcr & MCR_LOOP:
            for value in data:
                self._write_register(RBR_THR, value)
            return
        self._output(data)
        with self._lock:
            edge = self._transmitted()
        if edge:
            self._interrupt()

    # --- the host's side ---

    def receive(self, data: bytes) -> int:
        """Put host input into the receive FIFO; returns how many bytes were accepted.

        When that is fewer than offered, `room()` is called once the guest listens and has
        drained the FIFO.
        """
        with self._lock:
            accepted = min(len(data), self._space())
            self._received.extend(data[:accepted])
            if accepted < len(data):
                self._starved = True
            edge = accepted > 0 and self._identify() != IIR_NONE
        if edge:
            self._interrupt()
        return accepted

    def can_receive(self) -> bool:
        """Whether `receive` would take at least one byte; if not, `room()` will be called."""
        with self._lock:
            if self._space() > 0:
                return True
            self._starved = True
            return False

    # --- snapshots ---

    def state(self) -> State:
        """See vmm.core.saved.Stateful."""
        with self._lock:
            return {
                "received": bytes(self._received).hex(),
                "ier": self._ier,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "scratch": self._scratch,
                "divisor": self._divisor,
                "fifo_enabled": self._fifo_enabled,
                "trigger": self._trigger,
                "line_errors": self._line_errors,
                "modem_deltas": self._modem_deltas,
                "listens": self._listens,
                "transmit_cause": self._transmit_cause,
            }

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful. An interrupt that was on its way is sent once more."""
        with self._lock:
            self._received.extend(saved.bytes("received", most=FIFO_DEPTH))
            self._ier = saved.number("ier", 0x0F)
            self._lcr = saved.number("lcr", 0xFF)
            self._mcr = saved.number("mcr", 0x1F)
            self._scratch = saved.number("scratch", 0xFF)
            self._divisor = saved.number("divisor", 0xFFFF)
            self._fifo_enabled = saved.flag("fifo_enabled")
            self._trigger = saved.number("trigger", FIFO_DEPTH, 1)
            self._line_errors = saved.number("line_errors", 0xFF)
            self._modem_deltas = saved.number("modem_deltas", MSR_DELTAS)
            self._listens = saved.flag("listens")
            self._transmit_cause = saved.flag("transmit_cause")
            edge = self._pending()
        self._tell(edge, False)

    # --- registers ---

    def _read_register(self, offset: int) -> int:
        edge = wake = False
        with self._lock:
            if offset == RBR_THR:
                if self._lcr & LCR_DLAB:
                    return self._divisor & 0xFF
                value = self._received.popleft() if self._received else 0
                edge, wake = self._pending(), self._wants_room()
            elif offset == LSR:
                value = LSR_IDLE | self._line_errors | (LSR_READY if self._received else 0)
                if self._line_errors:
                    self._line_errors = 0
                    edge = self._pending()
                if not self._listens:
                    self._polls += 1
                    self._listens = self._polls >= _POLLS
                    wake = self._wants_room()
            elif offset == IIR_FCR:
                value = self._identify()
                if value == IIR_TRANSMIT:  # reading it is the acknowledgement
                    self._transmit_cause = False
                    edge = self._pending()
                if self._fifo_enabled:
                    value |= IIR_FIFO_ENABLED
            elif offset == IER:
                value = self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
            elif offset == LCR:
                value = self._lcr
            elif offset == MCR:
                value = self._mcr
            elif offset == MSR:
                value = self._modem_lines() | self._modem_deltas
                if self._modem_deltas:
                    self._modem_deltas = 0
                    edge = self._pending()
            elif offset == SCR:
                value = self._scratch
            else:
                value = 0xFF
        self._tell(edge, wake)
        return value

    def _write_register(self, offset: int, value: int) -> None:
        edge = wake = False
        if offset == RBR_THR and not self._lcr & LCR_DLAB and not self._mcr & MCR_LOOP:
            # Before the transmitter is declared empty: another vCPU's byte must not overtake.
            self._output(bytes((value,)))
        with self._lock:
            if offset == RBR_THR:
                self._polls = 0
                if self._lcr & LCR_DLAB:
                    self._divisor = (self._divisor & 0xFF00) | value
                else:
                    looped = bool(self._mcr & MCR_LOOP) and self._loop_back(value)
                    edge = self._transmitted() or looped
            elif offset == IER:
                if self._lcr & LCR_DLAB:
                    self._divisor = (self._divisor & 0xFF) | value << 8
                else:
                    if value & ~self._ier & IER_TRANSMIT:
                        self._transmit_cause = True  # enabling it with an empty THR raises it
                    self._ier = value & 0x0F
                    self._listen()
                    edge, wake = self._pending(), self._wants_room()
            elif offset == IIR_FCR:
                edge = self._control_fifo(value)
                wake = self._wants_room()
            elif offset == LCR:
                self._lcr = value
            elif offset == MCR:
                edge = self._control_modem(value)
                self._listen()
                wake = self._wants_room()
            elif offset == SCR:
                self._scratch = value
        self._tell(edge, wake)

    def _tell(self, edge: bool, wake: bool) -> None:
        if edge:
            self._interrupt()
        if wake and self._room is not None:
            self._room()

    # --- what follows is called with the lock held ---

    def _depth(self) -> int:
        return FIFO_DEPTH if self._fifo_enabled else 1

    def _space(self) -> int:
        """Bytes that the host may add now; none in loopback, where the line is cut off, and none
        that the guest would throw away."""
        if self._mcr & MCR_LOOP or not self._listens:
            return 0
        return self._depth() - len(self._received)

    def _listen(self) -> None:
        """IER or MCR was written: whether the receive interrupt reaches the guest from now on."""
        # OUT2 gates the interrupt line (IBM PC/AT). Linux sets it when a port is opened, while its
        # search for ports enables the interrupts for a moment without it.
        if self._ier & IER_RECEIVE and self._mcr & MCR_OUT2:
            self._listens = True

    def _wants_room(self) -> bool:
        """Whether to call room(): once per cut-short receive, when the FIFO is empty again."""
        if not self._starved or self._received or not self._space():
            return False
        self._starved = False
        return True

    def _identify(self) -> int:
        """The pending enabled cause of the highest priority, as IIR shows it."""
        ier = self._ier
        if ier & IER_LINE and self._line_errors:
            return IIR_LINE
        if ier & IER_RECEIVE and self._received:
            # Below the trigger level the character timeout has always run out already.
            return IIR_RECEIVE if len(self._received) >= self._trigger else IIR_TIMEOUT
        if ier & IER_TRANSMIT and self._transmit_cause:
            return IIR_TRANSMIT
        if ier & IER_MODEM and self._modem_deltas:
            return IIR_MODEM
        return IIR_NONE

    def _pending(self) -> bool:
        return self._identify() != IIR_NONE

    def _transmitted(self) -> bool:
        """A byte went out: raise the transmit cause; True when it was not standing already.

        A standing one has had its edge, and no guest can have missed it: acknowledging takes
        an IIR read, which clears it. Sixteen bytes in a row send one edge, not sixteen.
        """
        if self._transmit_cause:
            return False
        self._transmit_cause = True
        return bool(self._ier & IER_TRANSMIT)

    def _loop_back(self, value: int) -> bool:
        """The transmitter feeds the receiver; True when that leaves a cause pending."""
        if len(self._received) < self._depth():
            self._received.append(value)
        else:
            self._line_errors |= LSR_OVERRUN
        return self._pending()

    def _control_fifo(self, value: int) -> bool:
        """FCR; True when clearing the receiver leaves another cause pending."""
        enabled = bool(value & FCR_ENABLE)
        # Enabling the FIFO clears it too, says the data sheet. Linux does that when it listens
        # already, and a byte that has just come in would be lost.
        cleared = enabled < self._fifo_enabled or bool(value & FCR_CLEAR_RECEIVE)
        if cleared:
            self._received.clear()
        self._fifo_enabled = enabled
        self._trigger = _TRIGGER_LEVELS[value >> 6] if enabled else 1
        return cleared and self._pending()

    def _control_modem(self, value: int) -> bool:
        """MCR; True when a modem status change is left pending."""
        before = self._modem_lines()
        self._mcr = value & 0x1F
        after = self._modem_lines()
        changed = (before ^ after) >> 4
        if not before & ~after & MSR_RING:  # ring reports its trailing edge only
            changed &= ~MSR_DELTA_RING
        self._modem_deltas |= changed & MSR_DELTAS
        return bool(changed) and self._pending()

    def _modem_lines(self) -> int:
        """CTS, DSR and carrier are on: somebody is always at the other end."""
        if not self._mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_CARRIER
        return (
            (MSR_CTS if self._mcr & MCR_RTS else 0)
            | (MSR_DSR if self._mcr & MCR_DTR else 0)
            | (MSR_RING if self._mcr & MCR_OUT1 else 0)
            | (MSR_CARRIER if self._mcr & MCR_OUT2 else 0)
        )
