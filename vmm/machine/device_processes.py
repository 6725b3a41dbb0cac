"""Devices in processes of their own, as a run has them: what each has to be given."""

from __future__ import annotations

from kvm_bindings import fdops
from vmm.core.disk_image import SECTOR
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.devices.process.dialing import Dialing
from vmm.devices.process.front_end import MovedFile, ProcessDevice
from vmm.devices.process.spawner import Job, Spawner
from vmm.devices.virtio.block import F_FLUSH, VirtioBlock
from vmm.devices.virtio.block_file import DiskFile
from vmm.devices.virtio.net import VirtioNet

if TYPE_CHECKING:
    from vmm.devices.virtio.console import VirtioConsole
    from vmm.devices.virtio.vsock import VirtioVsock

DISK_PATIENCE = 1
"""As VirtioBlock's: pyvmm itself looks again and again, and one look is at what it has found."""


def _flushes(features: int) -> bool:
    """Whether a disk's driver flushes. For one that doesn't, a write is on the disk when it has
    been moved, which has to be before the device sees to that."""
    return bool(features & F_FLUSH)


class DeviceProcesses:
    """The processes of one run's devices."""

    def __init__(self, *, confined: bool) -> None:
        """`confined`: whether they are to be in sandboxes."""
        confine = None
        if confined:
            from vmm.sandbox.device import enter_device

            confine = enter_device
        self._spawner = Spawner(confine)

    def disk(self, name: str, disk: DiskFile) -> ProcessDevice:
        """The device that stands for a disk's."""
        device = VirtioBlock(disk, fdops.punch_hole, DISK_PATIENCE)
        number = self._spawner.add(Job(device, [disk.fd], [disk.fd], _flushes))
        moved = MovedFile(disk.fd, disk.sectors * SECTOR, disk.read_only)
        return ProcessDevice(device, name, number, self._spawner, [moved], fails_requests=True)

    def net(self, name: str, device: VirtioNet) -> ProcessDevice:
        """The device that stands for a network card."""
        fd = device.backend.fd
        number = self._spawner.add(Job(device, [], [fd]))
        return ProcessDevice(
            device, name, number, self._spawner,
            config_without=device.config_with(link_up=False),
            restarts=not device.backend.is_stream,
        )  # fmt: skip

    def vsock(self, name: str, device: VirtioVsock) -> ProcessDevice:
        """The device that stands for a vsock. Its process takes callers itself; the guest's own
        calls are put through from outside of its sandbox, to PATH_PORT and nowhere else."""
        dialing = Dialing(device.dial, device.dial_by)
        number = self._spawner.add(
            Job(device, [], device.listener.descriptors, accepts=True, dialing=dialing)
        )
        return ProcessDevice(
            device, name, number, self._spawner, events_without=[device.connections_gone]
        )

    def console(self, name: str, device: VirtioConsole) -> ProcessDevice:
        """The device that stands for a console."""
        number = self._spawner.add(Job(device, [], device.descriptors or (), accepts=True))
        return ProcessDevice(
            device, name, number, self._spawner,
            events_without=device.ports_shut, drops_without=device.said_to_nobody,
        )  # fmt: skip

    def begin(self) -> None:
        """All have been opened. This process should have no threads yet. Raises HostError."""
        self._spawner.begin()

    def close(self) -> None:
        self._spawner.close()
