"""Page tables that the first vCPU starts with, built from 2 MiB pages: data in, bytes out.

Linux gets one identity mapping whose every entry carries the encryption mask; the embedded
payload sees all RAM twice, at VA = GPA and at VA = GPA | C-bit, and may touch it from CPL 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from vmm.arch.x86_64 import layout
from vmm.core.errors import HostError, UsageError
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SIZE, Range

PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
# Set from the start: where KVM walks these tables itself (shadow paging, its emulator), it would
# have to write the bits through a host mapping that private memory does not have.
ACCESSED, DIRTY = 1 << 5, 1 << 6
LARGE = 1 << 7

ENTRIES = 512
LARGE_PAGE = 2 << 20
CANONICAL_BITS = 47  # a lower-half virtual address with four paging levels


class PageTables(NamedTuple):
    """What to write where, as (gpa, bytes), and the CR3 that makes the tables current."""

    writes: list[tuple[int, bytes]]
    cr3: int


class _Builder:
    """Four-level tables laid out one after the other from `start`, PML4 first."""

    def __init__(
        self, table_flags: int, page_flags: int, end: int, start: int = layout.PAGE_TABLES_GPA
    ) -> None:
        self._start = start
        self._tables: list[list[int]] = [[0] * ENTRIES]
        self._table_flags = table_flags
        self._page_flags = page_flags
        self._end = end

    def _below(self, table: int, index: int) -> int:
        """The number of the table that this entry points to, created when it is empty."""
        entry = self._tables[table][index]
        if entry:
            return ((entry ^ self._table_flags) - self._start) // PAGE_SIZE
        number = len(self._tables)
        gpa = self._start + number * PAGE_SIZE
        if gpa + PAGE_SIZE > self._end:
            raise UsageError(
                f"page tables for the guest do not fit below {self._end:#x}: "
                "give the guest less memory (--mem)"
            )
        self._tables.append([0] * ENTRIES)
        self._tables[table][index] = gpa | self._table_flags
        return number

    def map(self, virtual: int, physical: int, size: int) -> None:
        """Map `size` bytes, rounded outward to 2 MiB pages; the offset between both is fixed."""
        offset = virtual - physical
        end = physical + size
        page = physical & -LARGE_PAGE
        while page < end:
            address = page + offset
            pdpt = self._below(0, address >> 39 & 511)
            directory = self._below(pdpt, address >> 30 & 511)
            first = address >> 21 & 511
            count = min(ENTRIES - first, -(-(end - page) // LARGE_PAGE))
            past = page + count * LARGE_PAGE
            entries = range(page | self._page_flags, past | self._page_flags, LARGE_PAGE)
            self._tables[directory][first : first + count] = entries
            page = past

    def bytes(self) -> bytes:
        packer = struct.Struct(f"<{ENTRIES}Q")
        return b"".join(packer.pack(*table) for table in self._tables)


def identity_tables(c_mask: int = 0, end: int = layout.FOUR_GIB) -> PageTables:
    """Linux' first tables: VA = GPA for [0, end), `c_mask` in every entry and in CR3.

    Supervisor only, as the 64-bit boot protocol wants it. 4 GiB hold everything that Linux reads
    before it has tables of its own, and leave room below the command line.
    """
    common = PRESENT | WRITABLE | ACCESSED | c_mask
    builder = _Builder(common, common | DIRTY | LARGE, layout.CMDLINE_GPA)
    builder.map(0, 0, end)
    return PageTables([(layout.PAGE_TABLES_GPA, builder.bytes())], layout.PAGE_TABLES_GPA | c_mask)


def launch_tables(c_mask: int) -> tuple[PageTables, PageTables]:
    """What a strict guest starts with: tables for the loader's first steps, in shared memory, and
    those that it copies and goes on with, in private memory, which are Linux' first ones, too.

    In both, the launch area is private at VA = GPA and shared at VA = GPA + LAUNCH_SHARED_OFFSET.
    """
    area = layout.LAUNCH_GPA
    size = layout.LAUNCH_END - area
    common = PRESENT | WRITABLE | ACCESSED
    leaf = common | DIRTY | LARGE
    first = _Builder(common, leaf, layout.LAUNCH_TABLES_GPA, layout.LAUNCH_STAGE_ONE_TABLES_GPA)
    # A leaf's address carries the C-bit where it is private; a table's, in the second set, always.
    first.map(area, area | c_mask, size)
    first.map(area + layout.LAUNCH_SHARED_OFFSET, area, size)
    second = _Builder(
        common | c_mask, leaf, area + layout.LAUNCH_COPY_SIZE, layout.LAUNCH_TABLES_GPA
    )
    second.map(0, c_mask, layout.FOUR_GIB)
    second.map(area + layout.LAUNCH_SHARED_OFFSET, area, size)
    return (
        PageTables(
            [(layout.LAUNCH_STAGE_ONE_TABLES_GPA, first.bytes())],
            layout.LAUNCH_STAGE_ONE_TABLES_GPA,
        ),
        PageTables([(layout.LAUNCH_TABLES_GPA, second.bytes())], layout.LAUNCH_TABLES_GPA | c_mask),
    )


def payload_tables(ram: Iterable[Range], c_mask: int = 0) -> PageTables:
    """The embedded payload's tables: every RAM page user-accessible, at one or both aliases.

    The tables themselves lie in shared memory (no C-bit in CR3 or in upper entries); only the
    alias at VA = GPA | `c_mask` maps to private pages. With `c_mask` 0 there is one mapping.
    """
    if c_mask >> CANONICAL_BITS:
        raise HostError(
            f"C-bit mask {c_mask:#x} gives the payload virtual addresses past "
            f"{CANONICAL_BITS} bits: choose a lower C-bit"
        )
    common = PRESENT | WRITABLE | USER | ACCESSED
    builder = _Builder(common, common | DIRTY | LARGE, layout.PAYLOAD_TABLES_END)
    for span in ram:
        builder.map(span.start, span.start, span.size)
        if c_mask:
            builder.map(span.start | c_mask, span.start | c_mask, span.size)
    return PageTables([(layout.PAGE_TABLES_GPA, builder.bytes())], layout.PAGE_TABLES_GPA)


def user_tables(ram: Iterable[Range], shared: Sequence[Range], c_mask: int) -> PageTables:
    """The bench guest's tables: every RAM page user-accessible at VA = GPA, by the alias of the
    private side (`c_mask`) but for what is in `shared`, whose ranges are in address order; and
    by that of the private side at VA = GPA | `c_mask`."""
    common = PRESENT | WRITABLE | USER | ACCESSED
    builder = _Builder(common, common | DIRTY | LARGE, layout.CMDLINE_GPA)
    for span in ram:
        at = span.start
        for area in shared:
            if span.start <= area.start < span.end:
                if area.start > at:
                    builder.map(at, at | c_mask, area.start - at)
                builder.map(area.start, area.start, area.size)
                at = area.end
        builder.map(at, at | c_mask, span.end - at)
        builder.map(span.start | c_mask, span.start | c_mask, span.size)
    return PageTables([(layout.PAGE_TABLES_GPA, builder.bytes())], layout.PAGE_TABLES_GPA)
