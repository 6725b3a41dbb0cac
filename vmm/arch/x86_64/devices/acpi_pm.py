"""ACPI's fixed hardware: PM1a event and control registers, the power button among them, the PM
timer, the reset register.

ACPI 6.5, 4.8.3. There is no SMI_CMD: the machine is always in ACPI mode, so SCI_EN reads 1.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from vmm.arch.x86_64 import layout
from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

TIMER_HZ = 3_579_545
NS_PER_SECOND = 1_000_000_000

# Offsets in the block and their bytes; the gap and everything past the block read all ones.
STATUS, ENABLE, CONTROL, TIMER, RESET = (
    0,
    2,
    layout.PM1A_CNT_PORT - layout.PM1A_EVT_PORT,
    layout.PM_TMR_PORT - layout.PM1A_EVT_PORT,
    layout.RESET_PORT - layout.PM1A_EVT_PORT,
)

# PM1 enable: timer, global lock, power button, sleep button, RTC, PCI Express wake.
POWER_BUTTON = 1 << 8
ENABLE_MASK = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 14
ENABLE_BYTES = frozenset((ENABLE, ENABLE + 1))
SCI_EN, BM_RLD = 1 << 0, 1 << 1
SLP_TYP_SHIFT, SLP_TYP_MASK = 10, 7 << 10


class AcpiPm:
    """Ports 0x600-0x60f as one block.

    `power_off` is called when the guest sets SLP_EN with the S5 type of our \\_S5 object, `reset`
    when it writes RESET_VALUE to the reset register. `clock` counts nanoseconds and never goes
    back. `interrupt` raises the SCI, which stays up while `interrupt_pending`. The power button
    is the only event source; the other enable bits are kept, because ACPI drivers read back what
    they enabled. Safe to use from several threads.
    """

    __slots__ = (
        "_clock",
        "_control",
        "_enable",
        "_interrupt",
        "_lock",
        "_power_off",
        "_reset",
        "_start",
        "_status",
    )

    def __init__(
        self,
        clock: Callable[[], int],
        power_off: Callable[[], None],
        reset: Callable[[], None],
        interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock = clock
        self._power_off = power_off
        self._reset = reset
        self._interrupt = interrupt
        self._lock = Lock()
        self._start = clock()
        self._status = 0
        self._enable = 0
        self._control = SCI_EN

    def press_power_button(self) -> bool:
        """Tell the guest's driver that the power button was pressed; False when it has none,
        which is when nobody has enabled the event."""
        with self._lock:
            if not self._enable & POWER_BUTTON:
                return False
            self._status |= POWER_BUTTON
        self._interrupt()
        return True

    def interrupt_pending(self) -> bool:
        """Whether an enabled event is there, for which the SCI is to be up."""
        return bool(self._status & self._enable)

    def state(self) -> State:
        """See vmm.core.saved.Stateful."""
        with self._lock:
            return {
                "status": self._status,
                "enable": self._enable,
                "control": self._control,
                "timer_ns": self._clock() - self._start,
            }

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful."""
        with self._lock:
            self._status = saved.number("status", POWER_BUTTON) & POWER_BUTTON
            self._enable = saved.number("enable", 0xFFFF) & ENABLE_MASK
            self._control = saved.number("control", 0xFFFF) & (BM_RLD | SLP_TYP_MASK) | SCI_EN
            self._start = self._clock() - saved.number("timer_ns", 1 << 63)

    def put_forward(self, nanoseconds: int) -> None:
        """The timer goes on from so much later: the machine was away for a while."""
        with self._lock:
            self._start -= nanoseconds

    def timer(self) -> int:
        """The free-running 32-bit counter, 3.579545 MHz."""
        elapsed = self._clock() - self._start
        return elapsed * TIMER_HZ // NS_PER_SECOND & 0xFFFF_FFFF

    def read(self, offset: int, size: int) -> int:
        """`size` bytes from `offset`; all ones where there is no register."""
        block = (
            self._status.to_bytes(2, "little")
            + self._enable.to_bytes(2, "little")
            + self._control.to_bytes(2, "little")
            + b"\xff\xff"
            + self.timer().to_bytes(4, "little")
            + b"\0"
        )
        return int.from_bytes(block[offset : offset + size].ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write of any size; bytes outside the writable registers are dropped."""
        written = {offset + i: value >> 8 * i & 0xFF for i in range(size)}
        with self._lock:
            self._status &= ~_merge(0, STATUS, written)  # 4.8.3.1.1: writing ones clears
            if ENABLE in written or ENABLE + 1 in written:
                self._enable = _merge(self._enable, ENABLE, written) & ENABLE_MASK
            raised = self.interrupt_pending()
        if raised and ENABLE_BYTES & written.keys():
            self._interrupt()
        if CONTROL in written or CONTROL + 1 in written:
            self._write_control(_merge(self._control, CONTROL, written))
        if written.get(RESET) == layout.RESET_VALUE:
            self._reset()

    def _write_control(self, value: int) -> None:
        # SLP_EN is not kept (it reads 0): it is set here only if its own byte was written so.
        self._control = value & (BM_RLD | SLP_TYP_MASK) | SCI_EN
        sleep_type = (value & SLP_TYP_MASK) >> SLP_TYP_SHIFT
        if value & layout.SLEEP_ENABLE and sleep_type == layout.S5_SLEEP_TYPE:
            self._power_off()


def _merge(register: int, at: int, written: dict[int, int]) -> int:
    """A 16-bit register at offset `at` after those of its bytes that were written changed."""
    low = written.get(at, register & 0xFF)
    high = written.get(at + 1, register >> 8)
    return low | high << 8
