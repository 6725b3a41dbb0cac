"""The embedded payload on arm64: where it lies, and the page that tells it about its machine."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vmm.arch.aarch64 import layout
from vmm.core.ranges import PAGE_SIZE

MAGIC = int.from_bytes(b"PVMMINFO", "little")
FLAG_DISK = 1 << 0  # a virtio-blk disk is at PCI 0:1.0
FLAG_DOORBELL = 1 << 1  # it converts by the doorbell's registers
FLAG_PKVM = 1 << 2  # by pKVM's hypercalls; the doorbell serves the host's checks

INFO_GPA = layout.RAM_START
"""Where the information page goes; x0 points to it when the payload starts."""
PAYLOAD_GPA = layout.RAM_START + 0x10_0000
"""The first byte of the image, which is linked there."""
ENTRY = PAYLOAD_GPA
"""Where it is entered, as an arm64 kernel is: at EL1, MMU off, interrupts masked."""
PRIVATE_START = layout.RAM_START + 0x20_0000
"""The first byte of memory that it tests. All below is its own: image, variables, stack, info."""

_LAYOUT = struct.Struct("<9Q")


def payload_image() -> str:
    """The path of the flat image."""
    from firmware import payload_path

    return payload_path("aarch64")


class PayloadInfo(NamedTuple):
    """The page x0 points to when the payload starts, all fields little endian.

    struct payload_info {
        u64 magic;            /* "PVMMINFO" */
        u64 ram_start;
        u64 ram_end;
        u64 private_start;    /* RAM below is the payload's own */
        u64 shared_mask;      /* address bit of shared pages; 0: one address for both sides */
        u64 flags;            /* bit 0: a disk at PCI 0:1.0, 1: doorbell, 2: pKVM's hypercalls */
        u64 doorbell;         /* its registers; the failure code is there in any case */
        u64 serial;           /* a 16550's byte registers */
        u64 pci_config;       /* ECAM, bus 0 */
    };

    Of the two ways to convert at most one is set; without one it is an ordinary VM.
    """

    ram_end: int
    shared_mask: int = 0
    has_disk: bool = False
    has_doorbell: bool = False
    has_pkvm: bool = False

    def page(self) -> bytes:
        """The whole page, padded with zeros."""
        flags = FLAG_DISK * self.has_disk | FLAG_DOORBELL * self.has_doorbell
        fields = _LAYOUT.pack(
            MAGIC,
            layout.RAM_START,
            self.ram_end,
            PRIVATE_START,
            self.shared_mask,
            flags | FLAG_PKVM * self.has_pkvm,
            layout.DOORBELL_GPA,
            layout.UART_GPA,
            layout.PCI_ECAM_GPA,
        )
        return fields.ljust(PAGE_SIZE, b"\0")
