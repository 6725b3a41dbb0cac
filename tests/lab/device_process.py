"""Runs inside a lab machine: a guest's disk loses its process under load, and gets another one.

    python device_process.py POLICIES.PY KERNEL INITRD DISK REPORT

A line of JSON with what was seen goes to stdout; the test judges it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PYVMM = [sys.executable, "-sP", "/lab/project/pyvmm"]
LOAD = (
    "(n=0; while [ $n -lt 600 ] && dd if=/dev/urandom of=/mnt/f$n bs=4k count=8 conv=fsync "
    "2>/dev/null; do sha256sum /mnt/f$n >>/tmp/ok; n=$((n+1)); done; touch /tmp/over) &"
)
"""File by file, until one can't be written; those that were synced are noted in memory."""
FIRST = 1 << 20
"""Bytes of the load that are on the disk when the process is killed."""


def main(console_file: str, kernel: str, initrd: str, disk: str, report: str) -> None:
    spec = importlib.util.spec_from_file_location("policies", console_file)
    assert spec is not None and spec.loader is not None
    policies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policies)
    folder = Path(tempfile.mkdtemp())
    path = folder / "control"

    def ask(command: str) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(policies.COMMAND_LIMIT)
            connection.connect(str(path))
            connection.sendall(json.dumps({"command": command}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
            return answer

    console = policies.Console(
        [*PYVMM, "--kernel", kernel, "--initrd", initrd, "--append", "quiet", "--private-mem",
         "--disk", f"{disk},process", "--control", str(path), "--report", report],
        folder / "stderr",
    )  # fmt: skip

    def typed(command: str) -> str:
        console.type(command)
        text = console.expect_prompt(6 * policies.COMMAND_LIMIT)
        return "(no prompt)" if text is None else text.partition("\n")[2].strip()

    seen: dict[str, Any] = {"booted": console.expect_prompt(policies.BOOT_LIMIT) is not None}
    seen["mounted"] = typed("mount -t ext4 /dev/vda /mnt && echo yes")
    typed("echo 1 >/proc/sys/kernel/printk")  # nothing of the kernel's between the answers
    typed(LOAD)
    start = ask("dump-state")["io"]["blk0"]["bytes_written"]
    while ask("dump-state")["io"]["blk0"]["bytes_written"] < start + FIRST:
        pass
    os.kill(ask("devices")["devices"]["blk0"]["pid"], signal.SIGKILL)
    seen["over"] = typed("while [ ! -e /tmp/over ]; do sleep 1; done; echo $(wc -l </tmp/ok) files")
    seen["dmesg"] = typed("dmesg | grep -i 'i/o error' | head -n 3")
    seen["unmounted"] = typed("umount /mnt && echo yes")
    done = subprocess.run(
        [*PYVMM, "ctl", str(path), "device", "restart", "blk0"], capture_output=True, check=False
    )
    seen["restart"] = done.returncode
    seen["again"] = typed("mount -t ext4 /dev/vda /mnt && echo yes")
    seen["lost"] = typed("sha256sum -c /tmp/ok 2>&1 | grep -v ': OK$'")
    seen["after"] = typed(
        "dd if=/dev/urandom of=/mnt/n bs=4k count=64 conv=fsync 2>/dev/null && echo yes"
    )
    typed("umount /mnt")
    console.type("poweroff -f")
    seen["status"] = console.end()
    seen["stderr"] = (folder / "stderr").read_text()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
