"""Identity page tables of small arm64 guests: walked as the processor would."""

from __future__ import annotations

import struct

import pytest

from vmm.arch.aarch64.page_tables import (
    GIB,
    TABLES_SIZE,
    IdentityTables,
    identity_tables,
)

GPA, DEVICES = 0x4000, 3 * GIB
ADDRESS_FIELD = (1 << 48) - (1 << 12)


def walk(tables: IdentityTables, address: int) -> tuple[int, int]:
    """The block that maps an address as (output address, attribute index), from level 0."""

    def entry(table: int, index: int) -> int:
        word: int
        (word,) = struct.unpack_from("<Q", tables.data, table - GPA + 8 * index)
        return word

    top = entry(tables.registers["TTBR0_EL1"], address >> 39)
    assert top & 0b11 == 0b11
    block = entry(top & ADDRESS_FIELD, address >> 30 & 511)
    assert block & 0b11 == 0b01
    assert block & 1 << 10  # the access flag: there is nobody to handle its fault
    return block & ADDRESS_FIELD & -GIB | address & GIB - 1, block >> 2 & 0b111


@pytest.mark.parametrize(
    "address", [0, 0x1234_5678, DEVICES - 1, DEVICES + GIB, 1 << 39, (1 << 39) + 0x4567_8000]
)
def test_every_address_maps_to_itself_as_normal_memory(address: int) -> None:
    assert walk(identity_tables(GPA, DEVICES), address) == (address, 1)


@pytest.mark.parametrize("address", [DEVICES, DEVICES + GIB - 1])
def test_devices_gib_maps_to_itself_as_device_memory(address: int) -> None:
    assert walk(identity_tables(GPA, DEVICES), address) == (address, 0)


def test_tables_fill_exactly_the_space_that_is_planned_for_them() -> None:
    assert len(identity_tables(GPA, DEVICES).data) == TABLES_SIZE


def test_mmu_goes_on_after_everything_that_it_uses() -> None:
    assert list(identity_tables(GPA, DEVICES).registers)[-1] == "SCTLR_EL1"


@pytest.mark.parametrize(("gpa", "devices"), [(8, 0), (0, 4096), (1 << 40, 0), (0, 1 << 40)])
def test_places_that_cannot_be_are_refused(gpa: int, devices: int) -> None:
    with pytest.raises(ValueError, match="not aligned, or too high"):
        identity_tables(gpa, devices)
