"""The MC146818 real-time clock and its battery-backed bytes: ports 0x70 (index) and 0x71 (data).

Time is the injected clock's UTC plus whatever the guest set. The chip's interrupts are not
wired: their enable bits do not stick and status C stays 0, so a guest sees that none will come.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from vmm.arch.x86_64.devices.byte_ports import ABSENT, BytePorts
from vmm.core.lean_typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.core.saved import Saved, State

INDEX, DATA = 0, 1
SIZE = 128

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
STATUS_A, STATUS_B, STATUS_C, STATUS_D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

UPDATE_IN_PROGRESS = 0x80  # status A, set for the last 244 microseconds of a second
DIVIDER_32KHZ = 0x26  # status A at power-on: 32.768 kHz time base, 1.024 kHz rate
SET, BINARY, HOURS_24 = 0x80, 0x04, 0x02  # status B
INTERRUPTS = 0x70  # status B: periodic, alarm and update-ended interrupt enable
VALID = 0x80  # status D: the battery is good
PM = 0x80  # hours register in 12-hour mode

NS_PER_SECOND = 1_000_000_000
UPDATE_NS = 244_000
LAST_SECOND = 253_402_300_799  # 9999-12-31 23:59:59, where four year digits end


class Cmos(BytePorts):
    """The clock chip; `clock` gives nanoseconds since 1970 UTC (time.time_ns)."""

    __slots__ = ("_bytes", "_clock", "_frozen", "_index", "_lock", "_offset_seconds")

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._lock = Lock()  # several vCPUs at once, whatever the guest's own lock is worth
        self._offset_seconds = 0  # what the guest's setting of the clock amounts to
        self._frozen: dict[int, int] | None = None  # time registers while status B has SET
        self._index = 0
        self._bytes = bytearray(SIZE)
        self._bytes[STATUS_A] = DIVIDER_32KHZ
        self._bytes[STATUS_B] = HOURS_24
        self._bytes[STATUS_D] = VALID

    def state(self) -> State:
        """See vmm.core.saved.Stateful. The time is the host's; what the guest has set differs from
        it by an offset."""
        with self._lock:
            frozen = self._frozen
            return {
                "bytes": bytes(self._bytes).hex(),
                "index": self._index,
                "offset_seconds": self._offset_seconds,
                "frozen": None if frozen is None else [[at, now] for at, now in frozen.items()],
            }

    def restore(self, saved: Saved) -> None:
        """See vmm.core.saved.Stateful."""
        with self._lock:
            self._bytes[:] = saved.bytes("bytes", SIZE)
            self._bytes[STATUS_B] &= ~INTERRUPTS & 0xFF
            self._bytes[STATUS_C], self._bytes[STATUS_D] = 0, VALID
            self._index = saved.number("index", SIZE - 1)
            self._offset_seconds = saved.number("offset_seconds", LAST_SECOND, -LAST_SECOND)
            if saved.has("frozen"):
                rows = saved.numbers("frozen", 2, len(TIME_REGISTERS), 0xFF)
                self._frozen = dict.fromkeys(TIME_REGISTERS, 0)
                self._frozen |= {at: now for at, now in rows if at in TIME_REGISTERS}

    def read_byte(self, offset: int) -> int:
        if offset == INDEX:
            return self._index
        if offset != DATA:
            return ABSENT
        with self._lock:
            return self._read_register(self._index)

    def write_byte(self, offset: int, value: int) -> None:
        if offset == INDEX:
            self._index = value & (SIZE - 1)  # bit 7 masks NMI, which nobody raises
        elif offset == DATA:
            with self._lock:
                self._write_register(self._index, value)

    def _read_register(self, register: int) -> int:
        if register in TIME_REGISTERS:
            return self._time_registers()[register]
        if register == STATUS_A:
            return self._bytes[STATUS_A] | self._update_in_progress()
        return self._bytes[register]

    def _write_register(self, register: int, value: int) -> None:
        if register in TIME_REGISTERS:
            registers = self._time_registers()
            registers[register] = value
            if self._frozen is None:
                self._set_time(registers)
        elif register == STATUS_A:
            self._bytes[STATUS_A] = value & ~UPDATE_IN_PROGRESS
        elif register == STATUS_B:
            self._write_status_b(value & ~INTERRUPTS)
        elif register not in (STATUS_C, STATUS_D):
            self._bytes[register] = value

    def _write_status_b(self, value: int) -> None:
        """SET stops the visible clock, so that its registers can be written one by one."""
        if value & SET and self._frozen is None:
            self._frozen = self._time_registers()
        self._bytes[STATUS_B] = value
        if not value & SET and self._frozen is not None:
            registers, self._frozen = self._frozen, None
            self._set_time(registers)

    def _update_in_progress(self) -> int:
        if self._frozen is not None:
            return 0
        left = NS_PER_SECOND - self._clock() % NS_PER_SECOND
        return UPDATE_IN_PROGRESS if left <= UPDATE_NS else 0

    def _host_seconds(self) -> int:
        return self._clock() // NS_PER_SECOND

    def _time_registers(self) -> dict[int, int]:
        """The time of this moment, as the guest's choice of formats shows it."""
        if self._frozen is not None:
            return self._frozen
        from datetime import UTC, datetime  # not on the start-up path

        seconds = self._host_seconds() + self._offset_seconds
        now = datetime.fromtimestamp(min(max(seconds, 0), LAST_SECOND), UTC)
        encode = self._encode
        return {
            SECONDS: encode(now.second),
            MINUTES: encode(now.minute),
            HOURS: self._encode_hour(now.hour),
            WEEKDAY: encode(now.isoweekday() % 7 + 1),  # Sunday is 1
            DAY: encode(now.day),
            MONTH: encode(now.month),
            YEAR: encode(now.year % 100),
            CENTURY: encode(now.year // 100),
        }

    def _set_time(self, registers: dict[int, int]) -> None:
        """Make the clock go on from these registers; a time that does not exist is ignored."""
        from datetime import UTC, datetime

        decode = self._decode
        try:
            wanted = datetime(
                decode(registers[CENTURY]) * 100 + decode(registers[YEAR]),
                decode(registers[MONTH]),
                decode(registers[DAY]),
                self._decode_hour(registers[HOURS]),
                decode(registers[MINUTES]),
                decode(registers[SECONDS]),
                tzinfo=UTC,
            )
        except ValueError:
            return
        self._offset_seconds = int(wanted.timestamp()) - self._host_seconds()

    def _encode(self, value: int) -> int:
        if self._bytes[STATUS_B] & BINARY:
            return value
        return value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        """The number a register holds; ValueError for digits that are none."""
        if self._bytes[STATUS_B] & BINARY:
            return value
        return int(f"{value:x}")

    def _encode_hour(self, hour: int) -> int:
        if self._bytes[STATUS_B] & HOURS_24:
            return self._encode(hour)
        return self._encode((hour - 1) % 12 + 1) | (PM if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self._bytes[STATUS_B] & HOURS_24:
            return self._decode(value)
        return self._decode(value & ~PM) % 12 + (12 if value & PM else 0)
