"""The clock chip as a guest uses it: index, then data."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.arch.x86_64.devices.cmos import Cmos

NOW = datetime(2026, 11, 22, 23, 45, 9, tzinfo=UTC)  # a Sunday


class Guest:
    """A guest with the chip in front of it, and a hand on the host's clock."""

    def __init__(self, now: datetime = NOW) -> None:
        self.ns = int(now.timestamp()) * 10**9
        self.chip = Cmos(lambda: self.ns)

    def get(self, register: int) -> int:
        self.chip.write(0, 1, register)
        return self.chip.read(1, 1)

    def put(self, register: int, value: int) -> None:
        self.chip.write(0, 1, register)
        self.chip.write(1, 1, value)

    def time(self) -> list[int]:
        """Century, year, month, day, hours, minutes, seconds as the registers hold them."""
        return [self.get(r) for r in (0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00)]


def test_time_at_power_on_is_the_hosts_in_bcd() -> None:
    guest = Guest()

    assert guest.time() == [0x20, 0x26, 0x11, 0x22, 0x23, 0x45, 0x09]
    assert guest.get(0x06) == 1, "Sunday"


def test_time_follows_the_host_clock() -> None:
    guest = Guest()

    guest.ns += 51 * 10**9

    assert guest.time()[-2:] == [0x46, 0x00]


def test_time_in_binary_mode_is_binary() -> None:
    guest = Guest()

    guest.put(0x0B, 0x06)

    assert guest.time() == [20, 26, 11, 22, 23, 45, 9]


@pytest.mark.parametrize(
    ("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_hours_in_12_hour_mode_have_a_pm_bit(hour: int, shown: int) -> None:
    guest = Guest(NOW.replace(hour=hour))

    guest.put(0x0B, 0x00)

    assert guest.get(0x04) == shown


def test_status_registers_at_power_on_are_sane() -> None:
    guest = Guest()

    assert guest.get(0x0A) == 0x26
    assert guest.get(0x0B) == 0x02
    assert guest.get(0x0C) == 0
    assert guest.get(0x0D) == 0x80


def test_update_in_progress_shows_at_the_end_of_a_second() -> None:
    guest = Guest()

    guest.ns += 10**9 - 244_001
    assert guest.get(0x0A) & 0x80 == 0
    guest.ns += 1
    assert guest.get(0x0A) & 0x80
    guest.ns += 244_000
    assert guest.get(0x0A) & 0x80 == 0


def test_interrupt_enables_do_not_stick() -> None:
    guest = Guest()

    guest.put(0x0B, 0x72)

    assert guest.get(0x0B) == 0x02


def test_setting_the_clock_takes_effect_when_set_is_cleared() -> None:
    guest = Guest()

    guest.put(0x0B, 0x82)
    for register, value in ((0x32, 0x19), (0x09, 0x99), (0x08, 0x12), (0x07, 0x31)):
        guest.put(register, value)
    for register, value in ((0x04, 0x23), (0x02, 0x59), (0x00, 0x58)):
        guest.put(register, value)
    guest.ns += 7 * 10**9
    assert guest.get(0x00) == 0x58, "stopped while SET"
    guest.put(0x0B, 0x02)
    guest.ns += 3 * 10**9

    assert guest.time() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x01]


def test_setting_a_register_without_set_works_too() -> None:
    guest = Guest()

    guest.put(0x02, 0x00)

    assert guest.time() == [0x20, 0x26, 0x11, 0x22, 0x23, 0x00, 0x09]


def test_setting_an_impossible_time_is_ignored() -> None:
    guest = Guest()

    guest.put(0x08, 0x13)
    guest.put(0x07, 0x4F)

    assert guest.time() == [0x20, 0x26, 0x11, 0x22, 0x23, 0x45, 0x09]


def test_clock_set_to_the_last_second_of_9999_does_not_overflow() -> None:
    guest = Guest()
    guest.put(0x0B, 0x82)
    for register, value in ((0x32, 0x99), (0x09, 0x99), (0x08, 0x12), (0x07, 0x31)):
        guest.put(register, value)
    guest.put(0x04, 0x23)
    guest.put(0x0B, 0x02)

    guest.ns += 3600 * 10**9

    assert guest.time()[:3] == [0x99, 0x99, 0x12]


def test_nvram_bytes_are_kept_and_read_only_ones_are_not() -> None:
    guest = Guest()

    guest.put(0x0F, 0x0A)
    guest.put(0x7F, 0x55)
    guest.put(0x0D, 0x00)
    guest.put(0x0C, 0xFF)

    assert guest.get(0x0F) == 0x0A
    assert guest.get(0x7F) == 0x55
    assert guest.get(0x0D) == 0x80
    assert guest.get(0x0C) == 0


def test_index_port_ignores_the_nmi_bit() -> None:
    guest = Guest()

    guest.put(0x80 | 0x20, 7)

    assert guest.get(0x20) == 7


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x32]),
            st.integers(0, 255),
            st.integers(0, 10**12),
        ),
        max_size=30,
    )
)
def test_any_register_writes_leave_a_readable_clock(writes: list[tuple[int, int, int]]) -> None:
    guest = Guest()
    for register, value, passed in writes:
        guest.put(register, value)
        guest.ns += passed
        assert all(0 <= byte <= 255 for byte in guest.time())


def test_one_vcpu_at_a_time_is_served() -> None:
    inside: list[bool] = []

    def clock() -> int:
        if not inside:
            inside.append(True)
            other = threading.Thread(target=cmos.read, args=(1, 1))
            other.start()
            other.join(0.05)
            inside.append(other.is_alive())
            waiting.append(other)
        return 1_800_000_000 * 10**9

    waiting: list[threading.Thread] = []
    cmos = Cmos(clock)

    cmos.read(1, 1)

    assert inside == [True, True]
    waiting[0].join()
