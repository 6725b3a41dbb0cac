"""What the user said of the guest, as far as its architecture has to know."""

from __future__ import annotations


class GuestOptions:
    """Sizes are bytes; `append` goes to the end of the kernel's command line. `iommu`: whether a
    virtual IOMMU stands between its memory and its devices."""

    __slots__ = ("append", "cpus", "iommu", "is_private", "memory")

    def __init__(
        self, memory: int, cpus: int, append: str, *, is_private: bool, iommu: bool = False
    ) -> None:
        self.memory = memory
        self.cpus = cpus
        self.append = append
        self.is_private = is_private
        self.iommu = iommu
