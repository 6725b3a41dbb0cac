"""How QEMU is started: the lab machine's devices, drives and channels on one command line."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence

from vmm.lab.booted import Plugging, saved_state
from vmm.lab.emulator import Assets, Launch
from vmm.lab.job import Drive
from vmm.lab.options import LabOptions
from vmm.lab.packages import Qemu
from vmm.lab.streams import stream_pair

_SLOT, _FUNCTIONS = 0x10, 8
_CHANNELS: dict[str, object] = {"driver": "virtio-serial-pci", "id": "channels"}


def launch(
    qemu: Qemu,
    assets: Assets,
    options: LabOptions,
    drives: Sequence[Drive],
    streams: list[str],
    *,
    afresh: bool = False,
) -> Launch:
    """How QEMU is started, with a socket for each of the streams.

    The first of the drives holds the machine's root. Where drives can be plugged into a machine
    that runs, the others are, and it starts from a saved state unless `afresh`.
    """
    pairs = {name: stream_pair(name) for name in streams}
    inherited = [theirs for _, theirs in pairs.values()]
    fds = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
    words = _command(qemu, assets, options)
    nodes = [_block_node(f"drive{number}", drive) for number, drive in enumerate(drives)]
    devices = [_block_device(number, drive) for number, drive in enumerate(drives)]
    ports = _ports([name for name in streams if name != "serial"])
    if not assets.host.architecture.plugs or len(drives) > 1 + _FUNCTIONS:
        words += _chardevs(fds)
        words += ["-device", json.dumps(_CHANNELS)]
        for node in nodes:
            words += ["-blockdev", json.dumps(node)]
        for device in (*ports, *devices):
            words += ["-device", json.dumps(device)]
        plugging = None
    else:
        words += ["-blockdev", json.dumps(nodes[0])]
        for device in (_CHANNELS, devices[0]):
            words += ["-device", json.dumps(device)]
        # The other files are the cache's, whose names say what is in them.
        saved = saved_state(assets.cache, words, [qemu.program, assets.kernel])
        restores = saved.exists and not afresh
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        words += [*_chardevs({**fds, "monitor": theirs.fileno()}), "-mon", "monitor,mode=control"]
        words += ["-incoming", "defer"] if restores else []
        inherited.append(theirs)
        plugged = [*ports, *_in_one_slot(devices[1:])]
        plugging = Plugging(ours, saved, nodes[1:], plugged, restores)
    return Launch(
        words,
        {name: ours for name, (ours, _) in pairs.items()},
        _complaint,
        inherited=inherited,
        plugging=plugging,
    )


def _complaint(output: str) -> str | None:
    lines = [line for line in output.splitlines() if "warning: TCG doesn't support" not in line]
    return f"QEMU said: {lines[-1]}" if lines else None


def _command(qemu: Qemu, assets: Assets, options: LabOptions) -> list[str]:
    words = qemu.command()
    words += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    words += ["-accel", "tcg,thread=multi", *assets.host.architecture.qemu_machine]
    words += ["-smp", str(options.cpus or assets.host.cpus), "-m", str(options.memory_mib)]
    words += ["-kernel", str(assets.kernel), "-initrd", str(assets.initramfs)]
    words += ["-append", assets.host.command_line, "-serial", "chardev:serial"]
    return words


def _chardevs(fds: dict[str, int]) -> list[str]:
    words = []
    for name, fd in fds.items():
        words += ["-chardev", f"socket,id={name},fd={fd}"]
    return words


def _ports(names: Sequence[str]) -> list[dict[str, object]]:
    """The command's terminal, or its three standard streams."""
    if "console" in names:
        return [{"driver": "virtconsole", "chardev": "console"}]
    return [
        {"driver": "virtserialport", "chardev": name, "nr": number}
        for number, name in enumerate(names, start=1)
    ]


def _block_device(number: int, drive: Drive) -> dict[str, object]:
    device: dict[str, object] = {"driver": "virtio-blk-pci", "drive": f"drive{number}"}
    return device | ({"share-rw": True} if drive.shared else {})


def _in_one_slot(devices: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """The devices as functions of one PCI slot, in the order in which they have to be plugged.

    Linux looks at a slot when its function 0 is there, which comes last, and finds the others in
    the order of their numbers. Slots are looked at in any order (two workers of ACPI's), and the
    names of drives would go by that.
    """
    return [
        device | {"addr": f"{_SLOT:x}.{number:x}", "multifunction": True}
        for number, device in reversed(list(enumerate(devices)))
    ]


def _block_node(name: str, drive: Drive) -> dict[str, object]:
    # JSON, since file names may hold commas.
    driver = "host_device" if drive.path.is_block_device() else "file"
    file = {"driver": driver, "filename": str(drive.path), "read-only": drive.read_only}
    if drive.shared:
        file["locking"] = "off"
    return {"driver": "raw", "node-name": name, "read-only": drive.read_only, "file": file}
