"""The info page: what the embedded payload learns about its machine, as one structure."""

from __future__ import annotations

import struct

from vmm.arch.x86_64 import layout
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SIZE

MAGIC = int.from_bytes(b"PVMMINFO", "little")
FLAG_DISK = 1 << 0  # a virtio-blk disk is at PCI 0:1.0

_LAYOUT = struct.Struct("<8Q2I")


class PayloadInfo(NamedTuple):
    """The page RDI points to when the payload starts, all fields little endian.

    struct payload_info {
        u64 magic;            /* "PVMMINFO" */
        u64 ram_bytes;        /* end of low RAM */
        u64 c_bit_mask;       /* 0: one address for both sides */
        u64 private_start;    /* RAM below is shared from the start */
        u64 doorbell_port;    /* 0: no doorbell */
        u64 flags;            /* bit 0: a disk at PCI 0:1.0 */
        u64 serial_port;
        u64 poweroff_port;    /* 16-bit write of ... */
        u32 poweroff_value;   /* ... this powers off */
        u32 pad;
    };
    """

    ram_bytes: int
    c_bit_mask: int = 0
    doorbell_port: int = 0
    has_disk: bool = False

    def page(self) -> bytes:
        """The whole page, padded with zeros."""
        fields = _LAYOUT.pack(
            MAGIC,
            self.ram_bytes,
            self.c_bit_mask,
            layout.PAYLOAD_PRIVATE_START,
            self.doorbell_port,
            FLAG_DISK if self.has_disk else 0,
            layout.COM1_PORT,
            layout.PM1A_CNT_PORT,
            layout.POWER_OFF_VALUE,
            0,
        )
        return fields.ljust(PAGE_SIZE, b"\0")
