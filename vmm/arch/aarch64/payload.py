"""The information page: what the embedded payload learns about its machine, as one structure."""

from __future__ import annotations

import struct

from vmm.arch.aarch64 import layout
from vmm.core.lean_typing import NamedTuple
from vmm.core.ranges import PAGE_SIZE, Range

MAGIC = int.from_bytes(b"PVMMINFO", "little")
FLAG_DISK = 1 << 0  # a virtio-blk disk is at PCI 0:1.0
FLAG_DOORBELL = 1 << 1  # it converts by the doorbell's registers
FLAG_PKVM = 1 << 2  # by pKVM's hypercalls; the doorbell serves the host's checks

_LAYOUT = struct.Struct("<9Q")


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

    ram: Range
    scheme: str
    """The VM's ("none": an ordinary one)."""
    has_disk: bool

    def page(self) -> bytes:
        """The whole page, padded with zeros."""
        way = {"none": 0, "pkvm": FLAG_PKVM}.get(self.scheme, FLAG_DOORBELL)
        fields = _LAYOUT.pack(
            MAGIC,
            self.ram.start,
            self.ram.end,
            layout.PAYLOAD_PRIVATE_START,
            1 << layout.REALM_SHARED_BIT if self.scheme == "realm" else 0,
            way | FLAG_DISK * self.has_disk,
            layout.DOORBELL_GPA,
            layout.UART_GPA,
            layout.PCI_ECAM_GPA,
        )
        return fields.ljust(PAGE_SIZE, b"\0")
