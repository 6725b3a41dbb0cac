"""Fuzz targets: what each takes is in its docstring, how they are run in tests/fuzz/README.md."""

from __future__ import annotations

from tests.fuzz.targets import (
    apart,
    control,
    conversions,
    devices,
    disks,
    files,
    images,
    iommu,
    keeping,
    queue,
    registers,
    traces,
)
from tests.fuzz.targets.registry import TARGETS, Target

# Each module puts its targets among them.
_ALL = (
    apart, control, conversions, devices, disks, files, images, iommu, keeping, queue, registers,
    traces,
)  # fmt: skip

__all__ = ["TARGETS", "Target"]
