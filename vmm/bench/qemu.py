"""QEMU as the yardstick: the fastest that it can be made for the same guest, KVM and disk file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

COMMON = ["-accel", "kvm", "-cpu", "host", "-nodefaults", "-no-user-config", "-display", "none"]
COMMON += ["-serial", "stdio", "-no-reboot"]

# Queues are notified by port, as pyvmm's are: quicker than by memory, which KVM has to emulate.
_MODERN = "disable-legacy=on,modern-pio-notify=on"


def disk_guest(qemu: list[str], kernel: Path, disk: str, append: str) -> list[str]:
    """A PC with a modern virtio-blk disk whose queue is notified by port, not by memory."""
    return [
        *qemu, "-M", "pc", *COMMON, "-m", "256", "-device", "isa-debug-exit",
        "-drive", f"file={disk.replace(',', ',,')},format=raw,if=none,id=d",
        "-device", f"virtio-blk-pci,drive=d,{_MODERN}",
        "-kernel", str(kernel), "-append", append,
    ]  # fmt: skip


def quickest_guest(qemu: list[str], kernel: Path) -> list[str]:
    """A microvm without anything that takes time to set up."""
    machine = "microvm,acpi=off,pit=off,pic=off,rtc=off"
    return [
        *qemu, "-M", machine, *COMMON, "-m", "256",
        "-device", "isa-debug-exit,iobase=0xf4", "-kernel", str(kernel),
    ]  # fmt: skip


def linux_guest(
    qemu: list[str],
    kernel: str,
    initrd: str,
    append: str,
    disks: Sequence[str],
    tap: tuple[str, str] | None,
) -> list[str]:
    """A PC that boots Linux, as `pyvmm --kernel` does. All disks but the first are only read;
    `tap` is an interface, and the card's address.
    """
    devices = []
    for number, disk in enumerate(disks):
        drive = f"file={disk.replace(',', ',,')},format=raw,if=none,id=d{number}"
        devices += ["-drive", drive + (",readonly=on" if number else "")]
        devices += ["-device", f"virtio-blk-pci,drive=d{number},{_MODERN}"]
    if tap is not None:
        interface, mac = tap
        devices += ["-netdev", f"tap,id=n,ifname={interface},script=no,downscript=no"]
        # Without a ROM there's nothing to boot from, which takes time.
        devices += ["-device", f"virtio-net-pci,netdev=n,mac={mac},romfile=,{_MODERN}"]
    return [
        *qemu, "-M", "pc", *COMMON, "-m", "512", *devices,
        "-kernel", kernel, "-initrd", initrd, "-append", f"console=ttyS0 panic=-1 {append}",
    ]  # fmt: skip
