"""What a run gives its devices' processes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmm.core.errors import UsageError
from vmm.devices.virtio.block import F_FLUSH
from vmm.devices.virtio.block_file import open_disk
from vmm.machine.config import MachineConfig
from vmm.machine.device_processes import DeviceProcesses
from vmm.machine.peripherals import open_devices


def config(folder: Path, options: str) -> MachineConfig:
    disk = folder / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return MachineConfig(disks=(f"{disk}{options}",))


def test_disk_s_moves_wait_only_for_a_driver_that_flushes(tmp_path: Path) -> None:
    """Else a write has to be on the disk when its status is."""
    processes = DeviceProcesses(confined=False)
    disk = open_disk(config(tmp_path, ",process").disks[0])

    device = processes.disk("blk0", disk)

    (job,) = processes._spawner._jobs
    assert job.may_keep(F_FLUSH) and not job.may_keep(~F_FLUSH)
    device.close()


def test_device_stands_for_one_in_a_process_and_looks_the_same(tmp_path: Path) -> None:
    with ExitStack() as owner:
        apart = open_devices(config(tmp_path, ",process"), owner)["blk0"]
        seen = apart.features, apart.config(), apart.device_id, apart.queue_sizes, apart.engine
    with ExitStack() as owner:
        own = open_devices(config(tmp_path, ""), owner)["blk0"]

        assert seen == (own.features, own.config(), own.device_id, own.queue_sizes, own.engine)
        assert (apart.apart, own.apart) == (True, False)


def test_program_s_machine_has_no_processes(tmp_path: Path) -> None:
    with ExitStack() as owner, pytest.raises(UsageError, match="use pyvmm run"):
        open_devices(config(tmp_path, ",process"), owner, may_fork=False)


def test_vsock_that_is_refused_leaves_no_socket_behind(tmp_path: Path) -> None:
    asked = MachineConfig(vsock=f"path={tmp_path / 'v'},process")

    with pytest.raises(UsageError, match="use pyvmm run"), ExitStack() as owner:
        open_devices(asked, owner, may_fork=False)

    assert not list(tmp_path.iterdir())


def test_vsock_in_a_process_looks_the_same(tmp_path: Path) -> None:
    path = f"path={tmp_path / 'v'},cid=7"
    with ExitStack() as owner:
        apart = open_devices(MachineConfig(vsock=f"{path},process"), owner)["vsock"]
        seen = apart.features, apart.config(), apart.device_id, apart.queue_sizes
    assert not list(tmp_path.iterdir())
    with ExitStack() as owner:
        own = open_devices(MachineConfig(vsock=path), owner)["vsock"]

        assert seen == (own.features, own.config(), own.device_id, own.queue_sizes)
        assert (apart.apart, own.apart) == (True, False)


def test_consoles_in_a_process_look_the_same(tmp_path: Path) -> None:
    specs = f"socket={tmp_path / 's'}", f"file={tmp_path / 'f'},name=n"
    with ExitStack() as owner:
        asked = MachineConfig(consoles=tuple(f"{spec},process" for spec in specs))
        apart = open_devices(asked, owner)["console"]
        seen = apart.features, apart.config(), apart.device_id, apart.queue_sizes
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    with ExitStack() as owner:
        own = open_devices(MachineConfig(consoles=specs), owner)["console"]

        assert seen == (own.features, own.config(), own.device_id, own.queue_sizes)
        assert (apart.apart, own.apart) == (True, False)


def test_terminal_in_a_process_is_closed_once() -> None:
    """A second close would be some other file's."""
    with ExitStack() as owner:
        device = open_devices(MachineConfig(consoles=("pty,process",)), owner)["console"]
        device.close()
        there = {os.open(os.devnull, os.O_RDONLY) for _ in range(2)}

    for fd in there:
        os.close(fd)


def test_several_queues_in_a_process_are_refused(tmp_path: Path) -> None:
    with ExitStack() as owner, pytest.raises(UsageError, match="leave queues=2 away"):
        open_devices(config(tmp_path, ",process,queues=2"), owner)
