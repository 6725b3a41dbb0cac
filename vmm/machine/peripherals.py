"""The virtio devices that the user asked for, opened before the machine is made."""

from __future__ import annotations

from contextlib import ExitStack

from kvm_bindings import fdops
from vmm.core.errors import UsageError
from vmm.core.lean_typing import TYPE_CHECKING
from vmm.machine.config import VHOST_USER, MachineConfig

if TYPE_CHECKING:
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.machine.device_processes import DeviceProcesses
    from vmm.machine.execution import Execution

MOST_DEVICES = 31
"""PCI slots of bus 0 besides the host bridge's."""


def device_names(config: MachineConfig) -> list[str]:
    """What `open_devices` would call its devices, in their order, with nothing opened."""
    single = {
        "vsock": config.vsock is not None,
        "console": bool(config.consoles),
        "exec": config.execute is not None,
        "rng": config.rng,
        "balloon": config.balloon is not None,
        "iommu": config.iommu,
    }
    several = [f"blk{number}" for number in range(len(config.disks))]
    several += [f"net{number}" for number in range(len(config.nets))]
    several += [f"fs{number}" for number in range(len(config.file_systems))]
    return several + [name for name, is_there in single.items() if is_there]


def open_devices(
    config: MachineConfig,
    owner: ExitStack,
    execution: Execution | None = None,
    *,
    may_fork: bool = True,
) -> dict[str, VirtioDevice]:
    """The devices by their names in the report, in the order of their PCI slots: disks first.

    `owner` closes what was opened; `may_fork`: whether this process is the machine's alone.
    Raises UsageError and HostError. Only what is used is imported.
    """
    devices: dict[str, VirtioDevice] = {}
    processes: list[DeviceProcesses] = []

    def apart() -> DeviceProcesses:
        if not may_fork:
            raise UsageError(
                "a device's process is a fork of pyvmm's own, and this one is a program's; leave "
                "the setting process away, or use pyvmm run"
            )
        if not processes:
            from vmm.machine.device_processes import DeviceProcesses

            processes.append(DeviceProcesses(confined=config.sandbox != "off"))
            owner.callback(processes[0].close)
        return processes[0]

    def add(name: str, device: VirtioDevice) -> None:
        owner.callback(device.close)
        devices[name] = device

    if config.disks:
        from vmm.devices.virtio.block import VirtioBlock
        from vmm.devices.virtio.block_file import open_disk

        for number, spec in enumerate(config.disks):
            if spec.startswith(VHOST_USER):
                from vmm.devices.vhost_user import opening

                add(f"blk{number}", opening.open_disk(spec, f"blk{number}"))
                continue
            disk = open_disk(spec)
            if disk.apart:
                add(f"blk{number}", apart().disk(f"blk{number}", disk))
            else:
                add(f"blk{number}", VirtioBlock(disk, fdops.punch_hole))
            if disk.engine == "mmap" and not config.allow_mapped_io:
                raise UsageError(
                    f"--disk {spec}: io=mmap reads and writes guest memory itself, which nothing "
                    "else here does; use io=hva or io=fd2fd, or add --allow-mapped-io to measure it"
                )
    if config.nets:
        from vmm.devices.virtio.net_backend import open_net

        for number, spec in enumerate(config.nets):
            net = open_net(spec)
            if net.wants_process:
                add(f"net{number}", apart().net(f"net{number}", net))
            else:
                add(f"net{number}", net)
    for number, spec in enumerate(config.file_systems):
        from vmm.devices.vhost_user import opening

        add(f"fs{number}", opening.open_fs(spec, f"fs{number}"))
    if config.vsock is not None:
        from vmm.devices.virtio.vsock import open_vsock

        vsock = open_vsock(config.vsock)
        add("vsock", vsock)
        if vsock.wants_process:
            add("vsock", apart().vsock("vsock", vsock))
    if config.consoles:
        from vmm.devices.virtio.console_backend import open_console

        console = open_console(config.consoles)
        add("console", console)
        if console.descriptors is not None:
            add("console", apart().console("console", console))
    if execution is not None:
        add("exec", execution.device)
    if config.rng:
        from vmm.devices.virtio.rng import VirtioRng

        add("rng", VirtioRng())
    if config.balloon is not None:
        from vmm.devices.virtio.balloon_control import open_balloon

        add("balloon", open_balloon(config.balloon, config.memory))
    if config.iommu:
        from vmm.devices.virtio.iommu import VirtioIommu

        add("iommu", VirtioIommu())
    require_slots(len(devices))
    if processes:
        processes[0].begin()
    return devices


def require_slots(count: int) -> None:
    """Raise UsageError for more devices than there are PCI slots."""
    if count > MOST_DEVICES:
        raise UsageError(
            f"{count} virtio devices are asked for; PCI bus 0 has slots for {MOST_DEVICES}, "
            "use fewer --disk and --net"
        )
