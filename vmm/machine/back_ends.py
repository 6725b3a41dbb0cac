"""What a run whose devices other processes serve (vhost-user) has to look at, and to report."""

from __future__ import annotations

from collections.abc import Mapping

from vmm.core.errors import UsageError
from vmm.core.lean_typing import TYPE_CHECKING, cast
from vmm.devices.vhost_user.device import VhostUserDevice

if TYPE_CHECKING:
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.machine.config import MachineConfig
    from vmm.machine.guest_vm import GuestVm
    from vmm.machine.report_keys import BackEndUse


def require_fitting(config: MachineConfig, vm: GuestVm, is_watched: bool) -> None:
    """Raises UsageError where the shared side is no file of its own, to be mapped and punched.

    `is_watched`: a policy wants to be asked about each access (`on_io`).
    """
    spec = next((f"--fs {each}" for each in config.file_systems), None)
    option = spec or next(f"--disk {d}" for d in config.disks if d.startswith("vhost-user="))
    memory = vm.memory
    if not memory.told:
        raise UsageError(
            f"{option}: under scheme {vm.scheme.name} private and shared pages are one file, which "
            "a back end would have whole; use --disk FILE, or run without --private-mem"
        )
    if memory.in_place:
        raise UsageError(
            f"{option}: {memory.shared.name} has private and shared pages in one file, which a "
            "back end would have whole; use --private-mem=guest_memfd-plain, or --disk FILE"
        )
    if is_watched:
        raise UsageError(
            f"{option}: a policy asks about each access of a device (on_io), and a back end's are "
            "seen by nobody; use --disk FILE, or run without that policy"
        )


def described(devices: Mapping[str, VirtioDevice]) -> dict[str, BackEndUse]:
    """For the report: what each back end was given."""
    return {
        name: cast("BackEndUse", device.as_dict())
        for name, device in devices.items()
        if isinstance(device, VhostUserDevice)
    }
