"""How QEMU is started: the lab machine's devices, drives and channels on one command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmm.lab.job import Drive
from vmm.lab.options import LabOptions
from vmm.lab.packages import Qemu

_COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable"


@dataclass(frozen=True, slots=True)
class Assets:
    """Everything but the job, ready to boot."""

    qemu: Qemu
    kernel: Path
    initramfs: Path
    root: Path
    project: Path
    inner_qemu: Path | None


def qemu_command(
    assets: Assets, options: LabOptions, drives: Sequence[Drive], fds: dict[str, int]
) -> list[str]:
    """QEMU's command line; `fds` are the sockets it inherits, by stream name."""
    words = assets.qemu.command()
    words += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    words += ["-accel", "tcg,thread=multi", "-machine", "pc", "-cpu", "EPYC,+svm"]
    words += ["-smp", str(options.cpus), "-m", str(options.memory_mib)]
    words += ["-kernel", str(assets.kernel), "-initrd", str(assets.initramfs)]
    words += ["-append", _COMMAND_LINE]
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
        words += ["-device", f"virtio-blk-pci,drive=drive{number}"]
    return words


def _block_node(name: str, drive: Drive) -> dict[str, object]:
    # JSON, since file names may hold commas.
    driver = "host_device" if drive.path.is_block_device() else "file"
    file = {"driver": driver, "filename": str(drive.path), "read-only": drive.read_only}
    return {"driver": "raw", "node-name": name, "read-only": drive.read_only, "file": file}
