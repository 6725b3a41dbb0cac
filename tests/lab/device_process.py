"""Runs inside a lab machine: a guest's disk loses its process under load, and gets another one.

    python -m tests.lab.device_process KERNEL INITRD DISK REPORT

A line of JSON with what was seen goes to stdout; the test judges it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.policies import Console
from tests.lab.inside import SECONDS, ctl, pyvmm, said
from tests.support.control_client import ask

LOAD = (
    "(n=0; while [ $n -lt 600 ] && dd if=/dev/urandom of=/mnt/f$n bs=4k count=8 conv=fsync "
    "2>/dev/null; do sha256sum /mnt/f$n >>/tmp/ok; n=$((n+1)); done; touch /tmp/over) &"
)
"""File by file, until one can't be written; those that were synced are noted in memory."""
FIRST = 1 << 20
"""Bytes of the load that are on the disk when the process is killed."""


def main(kernel: str, initrd: str, disk: str, report: str) -> None:
    folder = Path(tempfile.mkdtemp())
    path = folder / "control"
    console = Console(
        pyvmm(kernel, initrd, "--private-mem", "--disk", f"{disk},process",
              "--control", str(path), "--report", report),
        folder / "stderr",
    )  # fmt: skip
    seen: dict[str, Any] = {"booted": console.expect_prompt(SECONDS) is not None}
    seen["mounted"] = said(console, "mount -t ext4 /dev/vda /mnt && echo yes")
    said(console, "echo 1 >/proc/sys/kernel/printk")  # nothing of the kernel's between the answers
    said(console, LOAD)
    start = ask(path, "dump-state", seconds=SECONDS)["io"]["blk0"]["bytes_written"]
    while ask(path, "dump-state", seconds=SECONDS)["io"]["blk0"]["bytes_written"] < start + FIRST:
        pass
    os.kill(ask(path, "devices", seconds=SECONDS)["devices"]["blk0"]["pid"], signal.SIGKILL)
    seen["over"] = said(
        console, "while [ ! -e /tmp/over ]; do sleep 1; done; echo $(wc -l </tmp/ok) files"
    )
    seen["dmesg"] = said(console, "dmesg | grep -i 'i/o error' | head -n 3")
    seen["unmounted"] = said(console, "umount /mnt && echo yes")
    seen["restart"], _ = ctl(path, "device", "restart", "blk0")
    seen["again"] = said(console, "mount -t ext4 /dev/vda /mnt && echo yes")
    seen["lost"] = said(console, "sha256sum -c /tmp/ok 2>&1 | grep -v ': OK$'")
    seen["after"] = said(
        console, "dd if=/dev/urandom of=/mnt/n bs=4k count=64 conv=fsync 2>/dev/null && echo yes"
    )
    said(console, "umount /mnt")
    console.type("poweroff -f")
    seen["status"] = console.end()
    seen["stderr"] = (folder / "stderr").read_text()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
