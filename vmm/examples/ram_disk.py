"""A virtio disk of one's own, in the memory of the program: what the guest writes can be looked at.

    pyvmm --private-mem --device vmm.examples.ram_disk:RamDisk,size=1M

A driver asks with a header (le32 type, le32 reserved, le64 sector) and the data of a write; the
last byte of the answer is the status (virtio 1.2, section 5.2.6).
"""

from __future__ import annotations

import struct

import vmm

READ, WRITE = 0, 1
OK, IO_ERROR, UNSUPPORTED = b"\0", b"\1", b"\2"
SECTOR = 512


class RamDisk(vmm.VirtioDevice):
    """`content` is the disk; `size` bytes are a multiple of 512."""

    name = "blk-ram"
    device_id = 2
    pci_class = 0x018000  # mass storage
    queue_sizes = (128,)

    def __init__(self, size: int = 1 << 20) -> None:
        super().__init__()
        self.content = bytearray(size // SECTOR * SECTOR)

    def config(self) -> bytes:
        return struct.pack("<Q52x", len(self.content) // SECTOR)

    def answer(self, queue: int, request: bytes, room: int) -> bytes:
        if len(request) < 16 or room < 1:
            return IO_ERROR[:room]
        kind, sector = struct.unpack_from("<I4xQ", request)
        data = request[16:]
        start, size = sector * SECTOR, len(data) if kind == WRITE else room - 1
        if kind not in (READ, WRITE):
            return bytes(room - 1) + UNSUPPORTED
        if start + size > len(self.content):
            return bytes(room - 1) + IO_ERROR
        if kind == WRITE:
            self.content[start : start + size] = data
            return bytes(room - 1) + OK
        return bytes(self.content[start : start + size]) + OK
