"""PL031, ECAM and the GICv2m frame, driven from outside by accesses of every kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.arch.aarch64.devices.gic_v2m import GicV2m
from vmm.arch.aarch64.devices.pci_ecam import PciEcam
from vmm.arch.aarch64.devices.pl031 import CONTROL, DATA, LOAD, MASK, MATCH, Pl031
from vmm.devices.bus import PortBus
from vmm.devices.pci import PciBus, PciFunction

SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8])


class Clock:
    """A clock that the test moves."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __call__(self) -> int:
        return self.seconds * 1_000_000_000


# -- PL031 ----------------------------------------------------------------------------------------


def test_clock_shows_the_hosts_seconds() -> None:
    clock = Clock(1_700_000_000)
    rtc = Pl031(clock)

    clock.seconds += 5

    assert rtc.read(DATA, 4) == 1_700_000_005


def test_clock_that_is_set_goes_on_from_there() -> None:
    clock = Clock(1_700_000_000)
    rtc = Pl031(clock)

    rtc.write(LOAD, 4, 100)
    clock.seconds += 7

    assert (rtc.read(DATA, 4), rtc.read(LOAD, 4)) == (107, 107)


def test_clock_wraps_at_32_bits() -> None:
    assert Pl031(Clock(2**32 + 3)).read(DATA, 4) == 3


def test_alarm_is_kept_and_its_mask_does_not_stick() -> None:
    rtc = Pl031(Clock(0))

    rtc.write(MATCH, 4, 42)
    rtc.write(MASK, 4, 1)

    assert (rtc.read(MATCH, 4), rtc.read(MASK, 4), rtc.read(CONTROL, 4)) == (42, 0, 1)


def test_identity_is_a_pl031s_as_the_amba_bus_reads_it() -> None:
    rtc = Pl031(Clock(0))

    bytes_read = [rtc.read(offset, 4) & 0xFF for offset in range(0xFE0, 0x1000, 4)]

    peripheral = int.from_bytes(bytes_read[:4], "little")
    assert peripheral & 0xFFFFF == 0x41031
    assert int.from_bytes(bytes_read[4:], "little") == 0xB105F00D


@given(st.integers(0, 0xFFF), SIZES, st.integers(0, 2**64 - 1))
def test_clock_survives_any_access(offset: int, size: int, value: int) -> None:
    rtc = Pl031(Clock(123))
    value &= (1 << 8 * size) - 1

    rtc.write(offset, size, value)

    assert 0 <= rtc.read(offset, size) < 1 << 8 * size
    assert 0 <= rtc.read(DATA, 4) < 1 << 32


# -- ECAM -----------------------------------------------------------------------------------------


def machine() -> tuple[PciEcam, PciFunction]:
    bus = PciBus(PortBus())
    function = PciFunction(0x1AF4, 0x1042, 0x01_0000)
    function.set_interrupt(0)
    bus.add(3, function)
    return PciEcam(bus), function


def at(device: int, register: int, function: int = 0) -> int:
    return device << 15 | function << 12 | register


@pytest.mark.parametrize(
    ("register", "size", "value"), [(0, 4, 0x1042_1AF4), (2, 2, 0x1042), (1, 1, 0x1A), (11, 1, 1)]
)
def test_configuration_is_read_in_any_part_of_a_dword(register: int, size: int, value: int) -> None:
    assert machine()[0].read(at(3, register), size) == value


def test_configuration_is_written() -> None:
    ecam, function = machine()

    ecam.write(at(3, 0x3C), 1, 77)

    assert function.read_config(0x3C, 1) == 77


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (at(3, 0), 8),  # no PCI access is that wide
        (at(3, 3), 2),  # crosses a dword
        (at(3, 1), 3),
        (at(3, 0x100), 4),  # there is no extended configuration space
        (at(3, 0xFFC), 4),
        (at(2, 0), 4),  # no device
        (at(3, 0, function=1), 4),
    ],
)
def test_access_to_what_is_not_there_reads_ones_and_writes_nothing(offset: int, size: int) -> None:
    ecam, function = machine()
    before = [function.read_config(register, 1) for register in range(256)]

    ecam.write(offset, size, 0)

    assert ecam.read(offset, size) == (1 << 8 * size) - 1
    assert [function.read_config(register, 1) for register in range(256)] == before


@given(st.integers(0, (1 << 20) - 1), SIZES, st.integers(0, 2**64 - 1))
def test_configuration_survives_any_access(offset: int, size: int, value: int) -> None:
    ecam, _ = machine()
    value &= (1 << 8 * size) - 1

    ecam.write(offset, size, value)

    assert 0 <= ecam.read(offset, size) < 1 << 8 * size


# -- GICv2m ---------------------------------------------------------------------------------------


def test_frame_says_which_interrupts_are_its() -> None:
    frame = GicV2m(64, 448)

    typer = frame.read(0x008, 4)

    assert (typer >> 16 & 0x3FF, typer & 0x3FF) == (64, 448)
    assert frame.read(0xFCC, 4) == 0


@given(st.integers(0, 0xFFF), SIZES, st.integers(0, 2**64 - 1))
def test_frame_changes_by_no_access(offset: int, size: int, value: int) -> None:
    frame = GicV2m(64, 448)

    frame.write(offset, size, value & (1 << 8 * size) - 1)

    assert frame.read(0x008, 4) == 64 << 16 | 448
    assert 0 <= frame.read(offset, size) < 1 << 8 * size
