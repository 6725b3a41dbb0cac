"""Identity page tables for small guests: virtual address = guest-physical address.

Without an MMU all memory of an arm64 guest is Device memory (Arm ARM D8.2.12, "stage 1 disabled"):
accesses go around the caches wherever the processor lacks FEAT_S2FWB, so that guest and host could
see different bytes, and `dc zva` and exclusive accesses fault. KVM sets HCR_EL2.DC for no guest. So
small guests run with the MMU on, as Linux does; the host writes the tables and the registers.
"""

from __future__ import annotations

import struct

from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SIZE

GIB = 1 << 30
ENTRIES = 512
TABLES_SIZE = 3 * PAGE_SIZE
"""A level 0 table and two of level 1: 40 address bits, in blocks of 1 GiB."""
ADDRESS_BITS = 40

# Descriptors (Arm ARM D8.3.1).
TABLE, BLOCK = 0b11, 0b01
_ACCESSED, _INNER_SHAREABLE = 1 << 10, 0b11 << 8
_NEVER_EXECUTE = 1 << 54 | 1 << 53  # UXN, PXN
_DEVICE, _NORMAL = 0, 1  # indexes of MAIR_EL1's attributes

MAIR = 0xFF << 8 * _NORMAL  # attribute 0: Device-nGnRnE, 1: Normal, write-back
TCR = (
    64 - ADDRESS_BITS  # T0SZ
    | 0b01 << 8  # IRGN0: table walks are write-back,
    | 0b01 << 10  # ORGN0,
    | 0b11 << 12  # SH0: inner shareable, in 4 KiB granules (TG0 = 0)
    | 1 << 23  # EPD1: nothing above
    | 0b010 << 32  # IPS: 40 bits
)
SCTLR = 0x30D0_0800 | 1 << 0 | 1 << 2 | 1 << 12
"""The bits that Armv8.0 wants set; MMU, data cache, instruction cache."""


class IdentityTables(NamedTuple):
    """What to write into guest memory, and the system registers by name, in the order in which
    they are to be set."""

    data: bytes
    registers: dict[str, int]


def normal_block(address: int) -> int:
    """A block of memory that is cached like a real guest's."""
    return address | _ACCESSED | _INNER_SHAREABLE | _NORMAL << 2 | BLOCK


def device_block(address: int) -> int:
    """A block of devices' registers."""
    return address | _ACCESSED | _NEVER_EXECUTE | _DEVICE << 2 | BLOCK


def identity_tables(gpa: int, devices: int) -> IdentityTables:
    """Tables that lie at `gpa`; the GiB at `devices` is Device memory, the other 1023 Normal.

    Raises ValueError for addresses that aren't aligned, or outside the 40 bits.
    """
    if gpa % PAGE_SIZE or devices % GIB or max(gpa, devices) >> ADDRESS_BITS:
        raise ValueError(f"tables at {gpa:#x}, devices at {devices:#x}: not aligned, or too high")
    tops = [gpa + PAGE_SIZE * number | TABLE for number in (1, 2)]
    blocks = [
        (device_block if address == devices else normal_block)(address)
        for address in range(0, 1 << ADDRESS_BITS, GIB)
    ]
    data = struct.pack(f"<{3 * ENTRIES}Q", *tops, *[0] * (ENTRIES - len(tops)), *blocks)
    # The MMU last: KVM cleans the guest's memory out of its caches when it sees it go on.
    registers = {"MAIR_EL1": MAIR, "TCR_EL1": TCR, "TTBR0_EL1": gpa, "SCTLR_EL1": SCTLR}
    return IdentityTables(data, registers)
