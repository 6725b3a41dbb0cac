"""The machines that the lab can be: what emulates them, and which KVM their Linux has."""

from __future__ import annotations

from dataclasses import dataclass

from vmm.core.errors import UsageError
from vmm.lab.devices import PC, VIRTIO, Devices


@dataclass(frozen=True, slots=True)
class Host:
    """One kind of lab machine, as `--host` names it."""

    name: str
    summary: str
    sw_protected: bool = False  # its KVM is compiled anew, with KVM_X86_SW_PROTECTED_VM
    bochs: bool = False  # emulated by Bochs, else by QEMU
    cpus: int = 2
    devices: Devices = VIRTIO


HOSTS = {
    host.name: host
    for host in (
        Host("stock", "Debian's kernel as it is, under QEMU (the default)"),
        Host(
            "sw-protected",
            "KVM compiled with KVM_X86_SW_PROTECTED_VM (once, half a minute)",
            sw_protected=True,
        ),
        # QEMU's emulated SVM has no nrip-save: KVM there reads each instruction that it emulates.
        Host(
            "bochs",
            "sw-protected under Bochs: guests' code may be private; slow, 1 CPU, no disks",
            sw_protected=True,
            bochs=True,
            cpus=1,
            devices=PC,
        ),
    )
}
DEFAULT = HOSTS["stock"]


def named(name: str) -> Host:
    """The host of that name; UsageError lists what there is."""
    host = HOSTS.get(name)
    if host is None:
        raise UsageError(f"--host {name}: no such host of the lab; there are {', '.join(HOSTS)}")
    return host
