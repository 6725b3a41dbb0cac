"""A small kernel for protected guests, compiled from Debian's source package.

Debian's arm64 kernels have neither ARM_PKVM_GUEST nor DMA_RESTRICTED_POOL: as protected guests they
share nothing, so that no device works. This one has both, all drivers built in, and a tenth of the
size, which counts where the host of the guest is emulated.
"""

from __future__ import annotations

from pathlib import Path

from vmm.lab.architecture import ARM64
from vmm.lab.kernel_build import SmallKernel

NAME = "pkvm-guest"
KERNEL = SmallKernel(
    name=NAME,
    label=f"the guest kernel {NAME}",
    architecture=ARM64,
    configurations=(Path(__file__).with_name(f"{NAME}.config"),),
    # Without them the kernel boots and its guest has no disk.
    required=("ARM_PKVM_GUEST", "DMA_RESTRICTED_POOL", "VIRTIO_PCI", "VIRTIO_BLK", "EXT4_FS"),
    files=900,
    minutes=7,
    otherwise="--kernel FILE takes another one",
)
