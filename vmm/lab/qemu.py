"""How QEMU is started: the lab machine's devices, drives and channels on one command line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vmm.lab.emulator import Assets, Launch
from vmm.lab.job import Drive
from vmm.lab.options import LabOptions
from vmm.lab.packages import Qemu
from vmm.lab.streams import stream_pair


def launch(
    qemu: Qemu, assets: Assets, options: LabOptions, drives: Sequence[Drive], streams: list[str]
) -> Launch:
    """How QEMU is started, with a socket for each of the streams."""
    pairs = {name: stream_pair(name) for name in streams}
    fds = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
    return Launch(
        _command(qemu, assets, options, drives, fds),
        {name: ours for name, (ours, _) in pairs.items()},
        _complaint,
        inherited=[theirs for _, theirs in pairs.values()],
    )


def _complaint(output: str) -> str | None:
    lines = [line for line in output.splitlines() if "warning: TCG doesn't support" not in line]
    return f"QEMU said: {lines[-1]}" if lines else None


def _command(
    qemu: Qemu,
    assets: Assets,
    options: LabOptions,
    drives: Sequence[Drive],
    fds: dict[str, int],
) -> list[str]:
    words = qemu.command()
    words += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    words += ["-accel", "tcg,thread=multi", *assets.host.architecture.qemu_machine]
    words += ["-smp", str(options.cpus or assets.host.cpus), "-m", str(options.memory_mib)]
    words += ["-kernel", str(assets.kernel), "-initrd", str(assets.initramfs)]
    words += ["-append", assets.host.command_line]
    for name, fd in fds.items():
        words += ["-chardev", f"socket,id={name},fd={fd}"]
    words += ["-serial", "chardev:serial", "-device", "virtio-serial-pci"]
    if "console" in fds:
        words += ["-device", "virtconsole,chardev=console"]
    else:
        for number, name in enumerate(("in", "out", "error"), start=1):
            words += ["-device", f"virtserialport,chardev={name},nr={number}"]
    for number, drive in enumerate(drives):
        words += ["-blockdev", json.dumps(_block_node(f"drive{number}", drive))]
        shared = ",share-rw=on" if drive.shared else ""
        words += ["-device", f"virtio-blk-pci,drive=drive{number}{shared}"]
    return words


def _block_node(name: str, drive: Drive) -> dict[str, object]:
    # JSON, since file names may hold commas.
    driver = "host_device" if drive.path.is_block_device() else "file"
    file = {"driver": driver, "filename": str(drive.path), "read-only": drive.read_only}
    if drive.shared:
        file["locking"] = "off"
    return {"driver": "raw", "node-name": name, "read-only": drive.read_only, "file": file}
