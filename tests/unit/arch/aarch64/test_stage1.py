"""arm64 guests' page tables, walked over tables made by hand."""

from __future__ import annotations

import pytest

from vmm.arch.aarch64.page_tables import SCTLR, TCR, identity_tables
from vmm.arch.aarch64.stage1 import MMU_ON, Regime, walk
from vmm.arch.debug import NotMapped

TABLE, BLOCK, PAGE = 0b11, 0b01, 0b11
ATTRIBUTES = 1 << 54 | 1 << 53 | 1 << 10 | 0b11 << 8 | 1 << 2
"""Of a page or block, none of which is part of its address."""
KERNEL = 0xFFFF_0000_0000_0000
"""Where the upper half begins with 48 bits of addresses."""
LPA2 = 1 << 59
IPS_52 = 0b110 << 32


class Tables:
    """Page tables to be walked; an entry that isn't there is zero."""

    def __init__(self, entries: dict[int, int]) -> None:
        self._entries = entries
        self.read: list[int] = []

    def __call__(self, gpa: int, size: int) -> bytes:
        self.read.append(gpa)
        return self._entries.get(gpa, 0).to_bytes(size, "little")


def tcr(bits0: int = 48, bits1: int = 48, granule0: int = 0b00, granule1: int = 0b10) -> int:
    """Sizes of both halves' addresses; granules as TG0 and TG1 have them (4 KiB)."""
    return 64 - bits0 | granule0 << 14 | 64 - bits1 << 16 | granule1 << 30


def regime(control: int, ttbr0: int = 0x1_0000, ttbr1: int = 0x2_0000) -> Regime:
    return Regime(MMU_ON, control, ttbr0, ttbr1)


# -- 4 KiB ----------------------------------------------------------------------------------------


def four_levels(first: int = 0x1_0000, page: int = 0x7000) -> Tables:
    """The second page of the lowest ones."""
    return Tables(
        {
            first: 0x3000 | TABLE,
            0x3000: 0x4000 | TABLE,
            0x4000: 0x5000 | TABLE,
            0x5000 + 8: page | ATTRIBUTES | PAGE,
        }
    )


def test_page_of_the_lower_half_is_behind_four_tables() -> None:
    tables = four_levels()

    assert walk(regime(tcr()), 0x1234, tables) == (0x7234, 0xDCC)
    assert tables.read == [0x1_0000, 0x3000, 0x4000, 0x5008]


def test_upper_half_has_tables_of_its_own() -> None:
    assert walk(regime(tcr()), KERNEL | 0x1234, four_levels(0x2_0000)) == (0x7234, 0xDCC)


def test_ttbrs_asid_and_common_bit_are_no_part_of_the_address() -> None:
    control = regime(tcr(), ttbr0=0x1_0000 | 0xABCD << 48 | 1)

    assert walk(control, 0x1234, four_levels()) == (0x7234, 0xDCC)


def test_bit_of_a_realms_shared_addresses_stays() -> None:
    bit = 1 << 39

    assert walk(regime(tcr()), 0x1234, four_levels(page=0x7000 | bit)) == (0x7234 | bit, 0xDCC)


@pytest.mark.parametrize(("level", "size"), [(2, 2 << 20), (1, 1 << 30)])
def test_block_ends_the_walk(level: int, size: int) -> None:
    block = 3 * size | ATTRIBUTES | BLOCK
    entries = {0x1_0000: 0x3000 | TABLE, 0x3000: block}
    if level == 2:
        entries = {**entries, 0x3000: 0x4000 | TABLE, 0x4000: block}

    assert walk(regime(tcr()), 0x1234, Tables(entries)) == (3 * size + 0x1234, size - 0x1234)


def test_39_bits_take_three_tables() -> None:
    entries = {0x1_0000 + 8 * 511: 0x4000 | TABLE, 0x4000 + 8 * 511: 0x5000 | TABLE,
               0x5000 + 8 * 511: 0x7000 | PAGE}  # fmt: skip

    assert walk(regime(tcr(39)), (1 << 39) - 4, Tables(entries)) == (0x7FFC, 4)


def test_first_table_with_few_entries_lies_at_its_own_alignment() -> None:
    """42 bits: eight entries of level 0 are 64 bytes."""
    tables = four_levels(0x1_0040 + 8 * 7)

    assert walk(regime(tcr(42), ttbr0=0x1_0040), 7 << 39 | 0x1234, tables) == (0x7234, 0xDCC)


def test_own_tables_for_small_guests_map_one_to_one() -> None:
    made = identity_tables(0x8000, 0xC000_0000)

    def read(gpa: int, size: int) -> bytes:
        return made.data[gpa - 0x8000 : gpa - 0x8000 + size]

    for address in (0x1234, 0xC000_0010, (1 << 40) - 8):
        assert walk(Regime(SCTLR, TCR, 0x8000, 0), address, read)[0] == address


# -- 16 and 64 KiB --------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [0, 1])
def test_16_kib_granule_is_walked(half: int) -> None:
    start = half * (1 << 64) - half * (1 << 47)
    entries = {(0x1_0000, 0x2_0000)[half]: 0x4_0000 | TABLE, 0x4_0000: 0x8_0000 | TABLE,
               0x8_0000 + 8: 0xC_C000 | ATTRIBUTES | PAGE}  # fmt: skip
    control = tcr(47, 47, 0b10, 0b01)

    assert walk(regime(control), start + 0x4123, Tables(entries)) == (0xC_C123, 0x3EDD)


def test_16_kib_granules_fourth_table_has_two_entries() -> None:
    entries = {
        0x1_0000 + 8: 0x2_0000 | TABLE,
        0x2_0000: 0x4_0000 | TABLE,
        0x4_0000: 5 << 25 | BLOCK,
    }
    control = tcr(48, granule0=0b10)

    assert walk(regime(control), 1 << 47 | 1, Tables(entries)) == (5 << 25 | 1, (1 << 25) - 1)


@pytest.mark.parametrize("half", [0, 1])
def test_64_kib_granule_is_walked(half: int) -> None:
    start = half * (1 << 64) - half * (1 << 42)
    entries = {(0x1_0000, 0x2_0000)[half]: 0x4_0000 | TABLE, 0x4_0000 + 8: 0x7_0000 | PAGE}
    control = tcr(42, 42, 0b01, 0b11)

    assert walk(regime(control), start + 0x1_0123, Tables(entries)) == (0x7_0123, 0xFEDD)


def test_64_kib_granules_block_has_512_mib() -> None:
    entries = {0x1_0000: 3 << 29 | ATTRIBUTES | BLOCK}

    found = walk(regime(tcr(42, granule0=0b01)), 0x1234, Tables(entries))

    assert found == (3 << 29 | 0x1234, (1 << 29) - 0x1234)


def test_64_kib_granules_52_bits_are_put_together() -> None:
    entries = {
        0x1_0000 | 5 << 48: 0x4_0000 | 0xA << 12 | TABLE,
        0x4_0000 | 0xA << 48: 0x5_0000 | TABLE,
        0x5_0000: 0x7_0000 | 0xF << 12 | PAGE,
    }
    control = regime(tcr(48, granule0=0b01) | IPS_52, ttbr0=0x1_0000 | 5 << 2)

    assert walk(control, 0x1234, Tables(entries)) == (0xF << 48 | 0x7_1234, 0xEDCC)


def test_small_first_table_leaves_room_for_52_bits() -> None:
    """44 bits: four entries, 32 bytes, at an alignment of 64 all the same."""
    entries = {0x1_0000 | 0xF << 48: 0x4_0000 | TABLE, 0x4_0000: 0x5_0000 | TABLE,
               0x5_0000: 0x7_0000 | PAGE}  # fmt: skip
    control = regime(tcr(44, granule0=0b01) | IPS_52, ttbr0=0x1_0000 | 0xF << 2)

    assert walk(control, 0x1234, Tables(entries)) == (0x7_1234, 0xEDCC)


# -- FEAT_LPA2 ------------------------------------------------------------------------------------


def test_52_bits_of_4_kib_pages_take_five_tables() -> None:
    high = 0b11 << 8  # bits 51:50 of an address
    entries = {0x1_0000 + 8 * 15: 0x3000 | TABLE, 0x3000: 0x4000 | TABLE, 0x4000: 0x5000 | TABLE,
               0x5000: 0x6000 | TABLE, 0x6000 + 8: 0x7000 | 3 << 48 | high | PAGE}  # fmt: skip
    tables = Tables(entries)

    found = walk(regime(tcr(52) | LPA2), 15 << 48 | 0x1234, tables)

    assert found == (0xF << 48 | 0x7234, 0xDCC)
    assert len(tables.read) == 5


def test_block_of_512_gib_is_one_only_with_lpa2() -> None:
    tables = Tables({0x1_0000: 1 << 39 | BLOCK})

    assert walk(regime(tcr() | LPA2), 0x1234, tables)[0] == 1 << 39 | 0x1234
    with pytest.raises(NotMapped, match="level 0"):
        walk(regime(tcr()), 0x1234, tables)


# -- what is refused ------------------------------------------------------------------------------


def test_without_an_mmu_addresses_are_physical() -> None:
    control = Regime(SCTLR & ~MMU_ON, 0, 0, 0)

    assert walk(control, 0x1234, Tables({})) == (0x1234, 0xDCC)
    with pytest.raises(NotMapped, match="MMU is off"):
        walk(control, 1 << 52, Tables({}))


@pytest.mark.parametrize("address", [1 << 48, 1 << 54, 0xFFFE_FFFF_FFFF_FFFF, 1 << 63, 0xAA << 56])
def test_address_between_the_halves_is_not_mapped(address: int) -> None:
    with pytest.raises(NotMapped, match="neither half"):
        walk(regime(tcr()), address, Tables({}))


def test_tag_in_the_top_byte_is_passed_over_where_the_processor_does() -> None:
    tagged, upper = 0xAA << 56 | 0x1234, 0xAAFF << 48 | 0x1234

    assert walk(regime(tcr() | 1 << 37), tagged, four_levels())[0] == 0x7234
    assert walk(regime(tcr() | 1 << 38), upper, four_levels(0x2_0000))[0] == 0x7234
    with pytest.raises(NotMapped, match="neither half"):
        walk(regime(tcr() | 1 << 38), tagged, four_levels())


@pytest.mark.parametrize(("bit", "address"), [(7, 0x1234), (23, KERNEL)])
def test_half_that_is_switched_off_is_not_mapped(bit: int, address: int) -> None:
    with pytest.raises(NotMapped, match="switched off"):
        walk(regime(tcr() | 1 << bit), address, four_levels())


@pytest.mark.parametrize(
    "control",
    [
        tcr(granule0=0b11),  # no granule
        64 - 11,  # 11 bits: less than a page
        64 - 53,
        64 - 52,  # five tables, and no FEAT_LPA2
        64 - 16 | 0b01 << 14,  # 64 KiB pages in 64 KiB
    ],
)
def test_control_register_that_nothing_is_walked_by_is_said(control: int) -> None:
    with pytest.raises(NotMapped, match="TCR_EL1"):
        walk(regime(control), 0x1234, four_levels())


@pytest.mark.parametrize(
    ("entries", "level"),
    [
        ({}, 0),
        ({0x1_0000: 0x3000 | TABLE, 0x3000: 0b10}, 1),
        ({0x1_0000: 0x3000 | TABLE, 0x3000: 0x4000 | TABLE}, 2),
        ({0x1_0000: 0x3000 | TABLE, 0x3000: 0x4000 | TABLE, 0x4000: 0x5000 | TABLE,
          0x5008: 0x7000 | BLOCK}, 3),
    ],
)  # fmt: skip
def test_entry_that_maps_nothing_is_named_by_its_level(entries: dict[int, int], level: int) -> None:
    with pytest.raises(NotMapped, match=f"level {level}"):
        walk(regime(tcr()), 0x1234, Tables(entries))


def test_walk_of_tables_that_lead_to_themselves_ends() -> None:
    tables = Tables({0x1_0000: 0x1_0000 | TABLE})

    assert walk(regime(tcr()), 0, tables) == (0x1_0000, 0x1000)
    assert len(tables.read) == 4


def test_refusal_of_a_table_is_passed_on() -> None:
    def read(gpa: int, size: int) -> bytes:
        raise OSError(f"{gpa:#x} is private")

    with pytest.raises(OSError, match="0x10000 is private"):
        walk(regime(tcr()), 0x1234, read)
