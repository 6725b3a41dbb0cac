"""What the lab machine's devices are called inside it: QEMU's are virtio, Bochs has a PC's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Devices:
    """Names in the machine's Linux, and the modules that it needs for its drives and channels."""

    drives: str  # what the drives' names begin with
    modules: tuple[str, ...]
    console: str  # of a command on a terminal; otherwise it has the other three
    input: str
    output: str
    error: str
    serial: str = "/dev/ttyS0"  # the kernel's console; the host's word that all was read comes here
    is_serial: bool = False  # the channels are serial lines: bytes can be lost, nothing ends them

    def drive(self, index: int) -> str:
        """Linux's naming of disks: vda ... vdz, vdaa ..."""
        name = ""
        index += 1
        while index:
            index, letter = divmod(index - 1, 26)
            name = chr(ord("a") + letter) + name
        return f"{self.drives}{name}"


VIRTIO = Devices(
    "/dev/vd",
    ("virtio_pci", "virtio_blk", "virtio_console"),
    console="/dev/hvc0",
    input="/dev/vport0p1",
    output="/dev/vport0p2",
    error="/dev/vport0p3",
)
PC = Devices(
    "/dev/sd",
    ("ata_piix", "sd_mod"),
    console="/dev/ttyS1",
    input="/dev/ttyS1",
    output="/dev/ttyS2",
    error="/dev/ttyS3",
    is_serial=True,
)
