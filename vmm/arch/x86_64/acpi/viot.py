"""Virtual I/O Translation table (ACPI 6.5, 5.2.34): which PCI functions an IOMMU translates for."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vmm.arch.x86_64.acpi.tables import HEADER_SIZE, table

REVISION = 0
PCI_RANGE, VIRTIO_IOMMU_PCI = 1, 3
# Header of the table: node count, node offset, reserved.
_COUNTS = struct.Struct("<HH8x")
# Nodes: type, reserved, length; then the segment and the function, or the first endpoint number,
# segments and functions from and to, and where in the table their IOMMU's node is.
_IOMMU = struct.Struct("<BxHHH8x")
_RANGE = struct.Struct("<BxHIHHHHH6x")


def viot(iommu: int, slots: Iterable[int]) -> bytes:
    """The table for an IOMMU in PCI slot `iommu` that translates for those in `slots`, all of them
    function 0 on bus 0; an endpoint's number is its PCI address."""
    offset = HEADER_SIZE + _COUNTS.size
    nodes = [_IOMMU.pack(VIRTIO_IOMMU_PCI, _IOMMU.size, 0, iommu << 3)]
    for slot in slots:
        function = slot << 3
        nodes.append(
            _RANGE.pack(PCI_RANGE, _RANGE.size, function, 0, 0, function, function, offset)
        )
    return table(b"VIOT", REVISION, _COUNTS.pack(len(nodes), offset) + b"".join(nodes))
