"""Page tables, read back by a page walker of the test's own (SDM vol. 3, 4.5)."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.page_tables import (
    PageTables,
    identity_tables,
    payload_tables,
    user_tables,
)
from vmm.core.errors import HostError, UsageError
from vmm.core.ranges import PAGE_SIZE, Range

C38 = 1 << 38
ADDRESS = 0x000F_FFFF_FFFF_F000


class Walk(NamedTuple):
    physical: int
    entries: list[int]


def walk(tables: PageTables, virtual: int, c_mask: int) -> Walk | None:
    """Translate as the processor does; tables are found with the C-bit taken off."""
    [(base, data)] = tables.writes
    table, entries = tables.cr3 & ADDRESS, []
    for shift in (39, 30, 21):
        at = (table & ~c_mask) - base + (virtual >> shift & 511) * 8
        (entry,) = struct.unpack_from("<Q", data, at)
        if not entry & 1:
            return None
        entries.append(entry)
        table = entry & ADDRESS
    assert entries[-1] & 0x80, "not a 2 MiB page"
    return Walk(entries[-1] & 0x000F_FFFF_FFE0_0000 | virtual & 0x1F_FFFF, entries)


@pytest.mark.parametrize("c_mask", [0, C38, 1 << 47])
@pytest.mark.parametrize("virtual", [0, 0x7000, 0x100_0000, 0x7FFF_FFFF, 0xFFFF_F123])
def test_identity_tables_translate_to_the_same_address(virtual: int, c_mask: int) -> None:
    tables = identity_tables(c_mask)

    found = walk(tables, virtual, c_mask)

    assert found is not None
    assert found.physical == virtual | c_mask
    assert tables.cr3 == 0x9000 | c_mask
    assert all(entry & c_mask == c_mask for entry in found.entries)
    assert all(entry & 0b111 == 0b011 for entry in found.entries), "supervisor, writable"


def test_identity_tables_end_at_4_gib_below_the_command_line() -> None:
    tables = identity_tables(C38)
    [(base, data)] = tables.writes

    assert walk(tables, 1 << 32, C38) is None
    assert base == layout.PAGE_TABLES_GPA
    assert base + len(data) <= layout.CMDLINE_GPA


def test_payload_tables_map_ram_at_both_aliases_for_user_mode() -> None:
    tables = payload_tables([Range(0, 512 << 20)], C38)

    for virtual in (0, 0x10_0000, 0x20_0000, (512 << 20) - 1):
        plain, alias = walk(tables, virtual, 0), walk(tables, virtual | C38, 0)
        assert plain is not None
        assert alias is not None
        assert plain.physical == virtual
        assert alias.physical == virtual | C38
        assert all(entry & 0b111 == 0b111 for entry in plain.entries + alias.entries)


def test_payload_tables_leave_what_is_not_ram_unmapped() -> None:
    tables = payload_tables([Range(0, 512 << 20)], C38)

    assert walk(tables, 512 << 20, 0) is None
    assert walk(tables, 512 << 20 | C38, 0) is None


def test_payload_tables_of_odd_ram_size_cover_its_last_page() -> None:
    tables = payload_tables([Range(0, (64 << 20) + PAGE_SIZE)], C38)

    assert walk(tables, 64 << 20, 0) is not None


def test_payload_tables_are_themselves_shared() -> None:
    tables = payload_tables([Range(0, 64 << 20)], C38)

    found = walk(tables, C38, 0)

    assert tables.cr3 == 0x9000
    assert found is not None
    assert all(entry & C38 == 0 for entry in found.entries[:-1])


def test_payload_tables_without_c_bit_have_one_alias() -> None:
    tables = payload_tables([Range(0, 64 << 20)])

    assert walk(tables, 0x1234, 0) is not None
    assert walk(tables, C38, 0) is None


def test_payload_tables_of_another_pml4_entry_work() -> None:
    tables = payload_tables([Range(0, 2 << 20)], 1 << 46)

    found = walk(tables, 1 << 46 | 5, 0)

    assert found is not None
    assert found.physical == 1 << 46 | 5


def test_payload_tables_with_non_canonical_alias_raise() -> None:
    with pytest.raises(HostError, match="0x800000000000"):
        payload_tables([Range(0, 2 << 20)], 1 << 47)


def test_payload_tables_of_too_much_ram_raise() -> None:
    with pytest.raises(UsageError, match="--mem"):
        payload_tables([Range(0, 3 << 30), Range(4 << 30, 100 << 30)], C38)


@pytest.mark.parametrize(
    ("virtual", "alias"),
    [(0, 0), (0x3F_FFFF, 0), (0x40_0000, C38), (0x80_1000, 0), (0xA0_0000, C38), (0x1FF_FFFF, C38)],
)
def test_user_tables_name_each_page_by_one_alias(virtual: int, alias: int) -> None:
    shared = [Range(0, 0x40_0000), Range(0x80_0000, 0x20_0000)]

    tables = user_tables([Range(0, 32 << 20)], shared, C38)

    found = walk(tables, virtual, C38)
    assert found is not None
    assert found.physical == virtual | alias
    assert all(entry & 0b111 == 0b111 for entry in found.entries), "user, writable"
    private = walk(tables, virtual | C38, C38)
    assert private is not None and private.physical == virtual | C38
    assert not tables.cr3 & C38
    assert walk(tables, 32 << 20, C38) is None
