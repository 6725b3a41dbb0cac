"""The estimate of where Linux puts its bounce buffer; the lab's boots hold it against the truth."""

from __future__ import annotations

import pytest

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.bounce_buffer import bounce_buffer_size, early_allocations
from vmm.core.ranges import PAGE_SIZE

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("ram", "size"),
    [(512 * MIB, 64 * MIB), (2 * GIB, 2 * GIB * 6 // 100), (64 * GIB, GIB)],
)
def test_bounce_buffer_is_six_percent_of_memory_within_its_bounds(ram: int, size: int) -> None:
    assert bounce_buffer_size(ram) == size


def test_early_allocations_end_with_low_memory_and_hold_initrd_and_struct_pages() -> None:
    ram = layout.ram_ranges(512 * MIB)

    without = early_allocations(ram, 0)
    with_initrd = early_allocations(ram, 10 * MIB + 1)

    assert without is not None and with_initrd is not None
    assert without.end == with_initrd.end == 512 * MIB
    assert with_initrd.start % PAGE_SIZE == 0
    assert without.size >= 64 * MIB + 512 * MIB // 64
    assert with_initrd.size >= without.size + 10 * MIB


def test_early_allocations_of_a_large_guest_stay_below_4_gib_without_struct_pages() -> None:
    ram = layout.ram_ranges(8 * GIB)

    area = early_allocations(ram, 0)

    assert area is not None
    assert area.end == layout.RAM_HOLE_START
    assert area.size < bounce_buffer_size(8 * GIB) + 8 * GIB // 64


def test_early_allocations_of_a_guest_that_they_would_mostly_fill_are_unknown() -> None:
    assert early_allocations(layout.ram_ranges(128 * MIB), 0) is None
