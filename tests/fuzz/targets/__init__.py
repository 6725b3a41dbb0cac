"""Fuzz targets: what each takes is in its docstring, how they are run in tests/fuzz/README.md."""

from __future__ import annotations

from tests.fuzz.targets import (
    conversions,
    devices,
    disks,
    files,
    images,
    iommu,
    queue,
    registers,
)
from tests.fuzz.targets.registry import TARGETS, Target

# Each module puts its targets among them.
_ALL = (conversions, devices, disks, files, images, iommu, queue, registers)

__all__ = ["TARGETS", "Target"]
