"""i8042, ACPI fixed hardware and PCI mechanism #1, driven from outside by port accesses."""

from __future__ import annotations

from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.arch.x86_64.devices.acpi_pm import POWER_BUTTON, AcpiPm
from vmm.arch.x86_64.devices.cmos import Cmos
from vmm.arch.x86_64.devices.i8042 import I8042
from vmm.arch.x86_64.devices.pci_conf1 import PciConf1


class Calls:
    """A callback that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


class Clock:
    """A clock that the test moves."""

    def __init__(self, ns: int = 0) -> None:
        self.ns = ns

    def __call__(self) -> int:
        return self.ns


class Config:
    """A PCI bus with one function, 0:1.0, that remembers what reached it."""

    def __init__(self) -> None:
        self.data = bytearray(range(256))
        self.writes: list[tuple[int, int, int, int, int, int]] = []

    def read_config(self, bus: int, device: int, function: int, register: int, size: int) -> int:
        if (bus, device, function) != (0, 1, 0):
            return (1 << 8 * size) - 1
        assert register % 4 + size <= 4
        return int.from_bytes(self.data[register : register + size], "little")

    def write_config(
        self, bus: int, device: int, function: int, register: int, size: int, value: int
    ) -> None:
        assert register % 4 + size <= 4
        assert value < 1 << 8 * size
        self.writes.append((bus, device, function, register, size, value))


# --- i8042 ---------------------------------------------------------------------------------------


def test_i8042_status_is_never_busy() -> None:
    device = I8042(Calls())

    assert device.read(4, 1) == 0
    assert device.read(0, 1) == 0


@pytest.mark.parametrize("command", [0xFE, 0xF0, 0xFC])
def test_i8042_pulse_of_the_reset_line_resets(command: int) -> None:
    reset = Calls()

    I8042(reset).write(4, 1, command)

    assert reset.count == 1


@pytest.mark.parametrize(
    ("offset", "size", "value"), [(4, 1, 0xFF), (4, 1, 0xD1), (0, 1, 0xFE), (1, 1, 0xFE)]
)
def test_i8042_other_writes_do_not_reset(offset: int, size: int, value: int) -> None:
    reset = Calls()

    I8042(reset).write(offset, size, value)

    assert reset.count == 0


def test_i8042_port_b_keeps_its_two_bits() -> None:
    device = I8042(Calls())

    device.write(1, 1, 0xFF)

    assert device.read(1, 1) == 0x23


# --- ACPI fixed hardware -------------------------------------------------------------------------


class Pm:
    """The block with its surroundings."""

    def __init__(self) -> None:
        self.clock, self.power_off, self.reset = Clock(10**12), Calls(), Calls()
        self.interrupt = Calls()
        self.device = AcpiPm(self.clock, self.power_off, self.reset, self.interrupt)


def test_pm_control_reports_acpi_mode() -> None:
    assert Pm().device.read(4, 2) == 1


def test_pm_s5_sleep_powers_off() -> None:
    pm = Pm()

    pm.device.write(4, 2, 0x3400)

    assert pm.power_off.count == 1
    assert pm.device.read(4, 2) == 0x1401, "SLP_EN reads 0"


def test_pm_acpica_two_writes_power_off_once() -> None:
    pm = Pm()

    pm.device.write(4, 2, 0x1401)
    pm.device.write(4, 2, 0x3401)

    assert pm.power_off.count == 1


def test_pm_byte_writes_power_off() -> None:
    pm = Pm()

    pm.device.write(5, 1, 0x34)

    assert pm.power_off.count == 1


@pytest.mark.parametrize("value", [0x2000, 0x3000, 0x1400, 0x3C00])
def test_pm_other_sleep_types_do_not_power_off(value: int) -> None:
    pm = Pm()

    pm.device.write(4, 2, value)

    assert pm.power_off.count == 0


def test_pm_low_byte_write_does_not_repeat_a_sleep() -> None:
    pm = Pm()
    pm.device.write(4, 2, 0x3400)

    pm.device.write(4, 1, 0)

    assert pm.power_off.count == 1


def test_pm_enable_bits_read_back() -> None:
    pm = Pm()

    pm.device.write(2, 2, 0xFFFF)

    assert pm.device.read(2, 2) == 0x4721
    assert pm.device.read(0, 4) == 0x4721 << 16
    assert pm.device.read(0, 2) == 0


def test_pm_power_button_interrupts_a_guest_that_enabled_it() -> None:
    pm = Pm()
    pm.device.write(2, 2, POWER_BUTTON)

    assert pm.device.press_power_button()

    assert pm.interrupt.count == 1
    assert pm.device.interrupt_pending()
    assert pm.device.read(0, 4) == POWER_BUTTON << 16 | POWER_BUTTON


def test_pm_power_button_that_nobody_listens_to_does_nothing() -> None:
    pm = Pm()
    pm.device.write(2, 2, 0xFFFF & ~POWER_BUTTON)

    assert not pm.device.press_power_button()

    assert pm.interrupt.count == 0
    assert pm.device.read(0, 2) == 0


@pytest.mark.parametrize(("offset", "size"), [(0, 2), (1, 1), (0, 4)])
def test_pm_status_is_cleared_by_writing_ones(offset: int, size: int) -> None:
    pm = Pm()
    pm.device.write(2, 2, POWER_BUTTON)
    pm.device.press_power_button()
    pm.device.write(offset, size, 0)
    assert pm.device.read(0, 2) == POWER_BUTTON

    pm.device.write(offset, size, (POWER_BUTTON << 16 | POWER_BUTTON) >> 8 * offset & 0xFFFFFFFF)

    assert pm.device.read(0, 2) == 0
    assert not pm.device.interrupt_pending()


def test_pm_event_that_is_disabled_and_enabled_again_interrupts_again() -> None:
    pm = Pm()
    pm.device.write(2, 2, POWER_BUTTON)
    pm.device.press_power_button()
    pm.device.write(2, 2, 0)
    assert not pm.device.interrupt_pending()

    pm.device.write(2, 2, POWER_BUTTON)

    assert pm.device.interrupt_pending()
    assert pm.interrupt.count == 2


def test_pm_timer_counts_at_its_frequency() -> None:
    pm = Pm()
    assert pm.device.read(8, 4) == 0

    pm.clock.ns += 1_000_000_000

    assert pm.device.read(8, 4) == 3_579_545


def test_pm_timer_wraps_at_32_bits() -> None:
    pm = Pm()

    pm.clock.ns += 1200 * 10**9

    assert pm.device.read(8, 4) == 1200 * 3_579_545 - 2**32


def test_pm_reset_register_takes_its_value_only() -> None:
    pm = Pm()

    pm.device.write(12, 1, 2)
    assert pm.reset.count == 0
    pm.device.write(12, 1, 1)
    assert pm.reset.count == 1


# --- PCI configuration mechanism #1 --------------------------------------------------------------


def address(device: int, register: int, *, enable: int = 1 << 31) -> int:
    return enable | device << 11 | register


def test_conf1_probe_of_linux_finds_it() -> None:
    conf1 = PciConf1(Config())

    conf1.write(3, 1, 0x01)
    conf1.write(0, 4, 0x8000_0000)

    assert conf1.read(0, 4) == 0x8000_0000


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [(4, 4, 0x13121110), (5, 1, 0x11), (6, 2, 0x1312), (7, 1, 0x13)],
)
def test_conf1_reads_of_each_size_reach_the_function(offset: int, size: int, expected: int) -> None:
    conf1 = PciConf1(Config())
    conf1.write(0, 4, address(1, 0x10))

    assert conf1.read(offset, size) == expected


def test_conf1_write_reaches_the_addressed_register() -> None:
    config = Config()
    conf1 = PciConf1(config)
    conf1.write(0, 4, 0x80FF_FFFF)

    conf1.write(6, 2, 0x1_BEEF)

    assert config.writes == [(255, 31, 7, 0xFE, 2, 0xBEEF)]


@pytest.mark.parametrize(("offset", "size"), [(7, 2), (7, 4), (5, 4), (1, 1), (0, 2), (8, 1)])
def test_conf1_accesses_off_the_registers_read_ones(offset: int, size: int) -> None:
    config = Config()
    conf1 = PciConf1(config)
    conf1.write(0, 4, address(1, 0))

    conf1.write(offset, size, 0)

    assert conf1.read(offset, size) == (1 << 8 * size) - 1
    assert config.writes == []


def test_conf1_without_enable_bit_reads_ones() -> None:
    config = Config()
    conf1 = PciConf1(config)
    conf1.write(0, 4, address(1, 0, enable=0))

    conf1.write(4, 4, 1)

    assert conf1.read(4, 4) == 0xFFFF_FFFF
    assert config.writes == []


# --- all of them ---------------------------------------------------------------------------------


class PortDevice(Protocol):
    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(["i8042", "pm", "conf1", "cmos"]),
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 0x1F),
            st.sampled_from([1, 2, 4]),
            st.integers(0, 2**32 - 1),
        ),
        max_size=40,
    ),
)
def test_port_devices_answer_hostile_accesses_in_range(
    name: str, accesses: list[tuple[bool, int, int, int]]
) -> None:
    clock = Clock(1_800_000_000 * 10**9)
    devices: dict[str, PortDevice] = {
        "i8042": I8042(Calls()),
        "pm": AcpiPm(clock, Calls(), Calls()),
        "conf1": PciConf1(Config()),
        "cmos": Cmos(clock),
    }
    device = devices[name]
    for is_write, offset, size, value in accesses:
        clock.ns += value
        if is_write:
            device.write(offset, size, value & ((1 << 8 * size) - 1))
        else:
            assert 0 <= device.read(offset, size) < 1 << 8 * size
