"""Small kernels for the lab machines themselves: with a KVM, or anything else, of the user's own.

What the machine's start, pyvmm and its tests ask of a host is in host-kernel.config, and what its
architecture adds beside it.
"""

from __future__ import annotations

from pathlib import Path

from vmm.lab.architecture import AMD64, ARM64, LabArchitecture
from vmm.lab.kernel_build import SmallKernel

_REQUIRED = (
    *("KVM", "VIRTIO_PCI", "VIRTIO_BLK", "VIRTIO_CONSOLE"),
    *("EXT4_FS", "OVERLAY_FS", "TMPFS", "DEVTMPFS", "BLK_DEV_INITRD"),
)
# What each asks of Kconfig besides, how many files it is and how many minutes they take.
_OF = {
    "x86": (("KVM_AMD", "KVM_IOAPIC", "HOTPLUG_PCI_ACPI", "SERIAL_8250_CONSOLE"), 1350, 10),
    "arm64": (("PCI_HOST_GENERIC", "SERIAL_AMBA_PL011_CONSOLE"), 900, 10),
}


def _kernel(architecture: LabArchitecture) -> SmallKernel:
    name = architecture.linux
    required, files, minutes = _OF[name]
    here = Path(__file__).parent
    return SmallKernel(
        name=f"host-kernel-{name}",
        label=f"a small {name} kernel for the lab machine",
        architecture=architecture,
        configurations=(here / "host-kernel.config", here / f"host-kernel-{name}.config"),
        required=_REQUIRED + required,
        files=files,
        minutes=minutes,
        otherwise="--lab-host-kernel FILE --lab-host-modules DIR take another one",
    )


KERNELS = {architecture.name: _kernel(architecture) for architecture in (AMD64, ARM64)}
"""By the name of their architecture."""
