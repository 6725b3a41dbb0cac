"""The VIOT table, read as Linux' drivers/acpi/viot.c does."""

from __future__ import annotations

import struct

from vmm.arch.x86_64.acpi.tables import RSDP_GPA, acpi_tables
from vmm.arch.x86_64.acpi.viot import viot
from vmm.arch.x86_64.guests import _iommu_table


def nodes(table: bytes) -> list[tuple[int, int, bytes]]:
    """(offset, type, body) of each node."""
    count, at = struct.unpack_from("<HH", table, 36)
    found = []
    for _ in range(count):
        kind, length = struct.unpack_from("<BxH", table, at)
        found.append((at, kind, table[at + 4 : at + length]))
        at += length
    assert at == len(table)
    return found


def test_table_names_the_iommu_and_each_function_that_it_is_in_front_of() -> None:
    table = viot(4, [1, 3])

    assert table[:4] == b"VIOT"
    assert struct.unpack_from("<I", table, 4) == (len(table),)
    assert sum(table) & 0xFF == 0
    (at, kind, body), *ranges = nodes(table)
    assert (kind, struct.unpack("<HH8x", body)) == (3, (0, 4 << 3))
    assert [(kind, struct.unpack("<IHHHHH6x", body)) for _, kind, body in ranges] == [
        (1, (8, 0, 0, 8, 8, at)),
        (1, (24, 0, 0, 24, 24, at)),
    ]


def test_iommu_is_not_in_front_of_itself_nor_of_a_balloon() -> None:
    (table,) = _iommu_table(["blk0", "rng", "balloon", "iommu"])

    (_, _, iommu), *ranges = nodes(table)
    assert struct.unpack_from("<HH", iommu) == (0, 4 << 3)
    assert [struct.unpack_from("<I", body)[0] for _, _, body in ranges] == [1 << 3, 2 << 3]


def test_xsdt_names_the_table() -> None:
    table = viot(2, [1])

    writes = dict(acpi_tables(1, {1: 10, 2: 11}, [table]))

    (gpa,) = [gpa for gpa, data in writes.items() if data == table]
    (xsdt,) = struct.unpack_from("<Q", writes[RSDP_GPA], 24)
    assert gpa in [entry for (entry,) in struct.iter_unpack("<Q", writes[xsdt][36:])]
