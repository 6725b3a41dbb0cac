"""What policies are told of lending; a run without a virtual IOMMU does without it."""

from __future__ import annotations

from typing import NamedTuple

from vmm.core.ranges import Range


class LendEvent(NamedTuple):
    """The guest maps `area` in its virtual IOMMU for `device`, at the IO virtual address `iova`,
    or takes it back. Whole pages of private memory, GPAs without the C-bit.

    `may_read` and `may_write` are from the device's point of view. `forced`: the guest has
    detached the device or reset the IOMMU, so that the pages come back whatever is said.
    """

    device: str
    iova: int
    area: Range
    may_read: bool
    may_write: bool
    forced: bool = False
