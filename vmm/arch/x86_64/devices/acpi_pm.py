"""ACPI's fixed hardware: PM1a event and control registers, the PM timer, the reset register.

ACPI 6.5, 4.8.3. There is no SMI_CMD: the machine is always in ACPI mode, so SCI_EN reads 1.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.arch.x86_64 import layout

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
ENABLE_MASK = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 14
SCI_EN, BM_RLD = 1 << 0, 1 << 1
SLP_TYP_SHIFT, SLP_TYP_MASK = 10, 7 << 10


class AcpiPm:
    """Ports 0x600-0x60f as one block.

    `power_off` is called when the guest sets SLP_EN with the S5 type of our \\_S5 object, `reset`
    when it writes RESET_VALUE to the reset register. `clock` counts nanoseconds and never goes
    back. No event source exists yet, so status bits stay 0; enable bits are kept, because ACPI
    drivers read back what they enabled.
    """

    __slots__ = ("_clock", "_control", "_enable", "_power_off", "_reset", "_start")

    def __init__(
        self,
        clock: Callable[[], int],
        power_off: Callable[[], None],
        reset: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._power_off = power_off
        self._reset = reset
        self._start = clock()
        self._enable = 0
        self._control = SCI_EN

    def timer(self) -> int:
        """The free-running 32-bit counter, 3.579545 MHz."""
        elapsed = self._clock() - self._start
        return elapsed * TIMER_HZ // NS_PER_SECOND & 0xFFFF_FFFF

    def read(self, offset: int, size: int) -> int:
        """`size` bytes from `offset`; all ones where there is no register."""
        block = (
            bytes(2)
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
        if ENABLE in written or ENABLE + 1 in written:
            self._enable = _merge(self._enable, ENABLE, written) & ENABLE_MASK
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
