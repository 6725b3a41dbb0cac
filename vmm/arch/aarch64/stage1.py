"""The guest's own page tables (stage 1), walked in software: arm64 has no KVM_TRANSLATE.

Arm ARM D8.2 and D8.3: the translation regime of EL1 and EL0 with granules of 4, 16 and 64 KiB, up
to 52 bits of addresses (FEAT_LVA, FEAT_LPA, FEAT_LPA2). Whether the guest may access a page, and in
what way, is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable

from vmm.arch.debug import NotMapped
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SIZE

MMU_ON = 1 << 0
"""SCTLR_EL1.M."""
_GRANULES = ({0: 12, 1: 16, 2: 14}, {1: 14, 2: 12, 3: 16})
"""Bits of an address within a granule, by TCR_EL1.TG0 and by .TG1."""
_GRANULE_FIELDS, _SIZE_FIELDS, _OFF_BITS = (14, 30), (0, 16), (7, 23)
_IGNORES_TOP_BYTE = (37, 38)
_LPA2 = 1 << 59
"""TCR_EL1.DS."""
_52_BITS = 0b110
"""TCR_EL1.IPS."""
_VALID, _TABLE = 1 << 0, 1 << 1
_LEAST_BITS, _MOST_BITS = 16, 52
_LAST_LEVEL = 3
_LARGEST_BLOCK = {12: 1, 14: 2, 16: 2}
"""The first level that has blocks; one earlier where output addresses have 52 bits."""


class Regime(NamedTuple):
    """The registers that say how EL1 and EL0 translate."""

    sctlr: int
    tcr: int
    ttbr0: int
    ttbr1: int


def walk(regime: Regime, address: int, read_entry: Callable[[int, int], bytes]) -> tuple[int, int]:
    """The guest-physical address behind a virtual one, and the bytes up to the page's end.

    At most five entries are read, with `read_entry(gpa, size)`. Raises NotMapped, and what
    `read_entry` raises.
    """
    if not regime.sctlr & MMU_ON:
        if address >> _MOST_BITS:
            raise NotMapped(f"{address:#x} is no guest-physical address, and the MMU is off")
        return address, PAGE_SIZE - address % PAGE_SIZE
    tcr = regime.tcr
    half = address >> 55 & 1  # which of the two tables: bit 63 may be a tag's
    granule = _GRANULES[half].get(tcr >> _GRANULE_FIELDS[half] & 3)
    bits = 64 - (tcr >> _SIZE_FIELDS[half] & 0x3F)
    if granule is None or not max(_LEAST_BITS, granule + 1) <= bits <= _MOST_BITS:
        raise NotMapped(f"TCR_EL1 {tcr:#x} is none that page tables are walked by")
    tag_bits = 8 if tcr >> _IGNORES_TOP_BYTE[half] & 1 else 0
    above = (address & (1 << 64 - tag_bits) - 1) >> bits
    if above != half * ((1 << 64 - tag_bits - bits) - 1):
        raise NotMapped(f"{address:#x} is in neither half of the address space")
    if tcr >> _OFF_BITS[half] & 1:
        raise NotMapped(f"TTBR{half}_EL1, whose half {address:#x} is in, is switched off")

    is_lpa2 = bool(tcr & _LPA2) and granule != 16
    is_wide = is_lpa2 or (granule == 16 and tcr >> 32 & 7 == _52_BITS)
    stride = granule - 3
    levels = -((granule - bits) // stride)
    if levels > (5 if is_lpa2 else 4):
        raise NotMapped(f"TCR_EL1 {tcr:#x} has addresses of {bits} bits without FEAT_LPA2")
    first_bits = bits - granule - stride * (levels - 1)
    inside = address & (1 << bits) - 1
    table = _first_table(regime.ttbr1 if half else regime.ttbr0, 8 << first_bits, is_wide)
    for level in range(_LAST_LEVEL + 1 - levels, _LAST_LEVEL + 1):
        shift = granule + stride * (_LAST_LEVEL - level)
        # There is nothing above the first level's bits, which may be fewer than a table has.
        index = inside >> shift & (1 << stride) - 1
        entry = int.from_bytes(read_entry(table + 8 * index, 8), "little")
        is_leaf = level == _LAST_LEVEL or not entry & _TABLE
        if not entry & _VALID or (is_leaf and not _may_end(entry, level, granule, is_wide)):
            raise NotMapped(f"{address:#x} is not mapped (level {level} of the page tables)")
        table = _output(entry, granule, is_lpa2)
        if is_leaf:
            size = 1 << shift
            offset = inside & (size - 1)
            return (table & -size) + offset, size - offset
    raise AssertionError("a walk ends at level 3")


def _first_table(ttbr: int, size: int, is_wide: bool) -> int:
    """Where the first table lies, which is aligned to its size: TTBR<n>_EL1.BADDR."""
    if not is_wide:
        return ttbr & (1 << 48) - 1 & -size
    return (ttbr & (1 << 48) - 1 & -max(size, 64)) | (ttbr >> 2 & 0xF) << 48


def _may_end(entry: int, level: int, granule: int, is_wide: bool) -> bool:
    """Whether a valid descriptor that is no table's maps a page or a block there."""
    if level == _LAST_LEVEL:
        return bool(entry & _TABLE)
    return level >= _LARGEST_BLOCK[granule] - is_wide


def _output(entry: int, granule: int, is_lpa2: bool) -> int:
    """The address in a descriptor. With 52 bits its top ones are where others have attributes."""
    if is_lpa2:
        return entry & (1 << 50) - (1 << granule) | (entry >> 8 & 3) << 50
    address = entry & (1 << 48) - (1 << granule)
    if granule == 16:
        address |= (entry >> 12 & 0xF) << 48
    return address
