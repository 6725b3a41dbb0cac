"""Runs inside a lab machine: boots a guest, saves it at work, and has it go on in another pyvmm.

    python -m tests.lab.save_and_restore KERNEL INITRD IMAGE DISK BACKING CPUS

DISK is made, as a copy of IMAGE.
A line of JSON with what was seen goes to stdout; the test judges it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.policies import Console
from tests.lab.inside import PYVMM, SECONDS, ctl, pyvmm, said, telling

AWAY_SECONDS = 20
WRITING = (
    "lines() { grep -cs . /mnt/log; }; mark=$((6 * 7)); mount -t ext4 /dev/vda /mnt; "
    "(n=0; while :; do n=$((n + 1)); echo line $n >>/mnt/log; "
    "dd if=/dev/urandom of=/mnt/data.$((n % 8)) bs=64k count=4 2>/dev/null; sync; done) &"
)
LINES = "until [ 0$(lines) -gt {} ]; do sleep 1; done; lines"
"""How many there are, once there are more."""


def main(kernel: str, initrd: str, image: str, disk: str, backing: str, cpus: str) -> None:
    shutil.copy(image, disk)
    folder = Path(tempfile.mkdtemp(dir=Path(disk).parent))
    path = folder / "control"

    def timed(*words: str) -> dict[str, Any]:
        began = time.monotonic()
        status, answer = ctl(path, *words)
        seconds = round(time.monotonic() - began, 2)
        return {"exit": status, "answer": answer, "seconds": seconds}

    seen: dict[str, Any] = {}
    with telling(folder / "stderr"):
        words = pyvmm(kernel, initrd, "--mem", "256M", "--cpus", cpus)
        words += ["--disk", disk, "--control", str(path)]
        words += [] if backing == "none" else [f"--private-mem={backing}"]
        console = Console(words, folder / "stderr")
        seen["booted"] = console.expect_prompt(SECONDS) is not None
        said(console, WRITING)
        seen["lines before"] = said(console, LINES.format(0))
        private = [] if backing == "none" else ["--with-private"]
        seen["dump"] = timed("dump", str(folder.parent / "core"))
        seen["snapshot"] = timed("snapshot", str(folder / "saved"), *private, "--then-quit")
        seen["ended"] = [console.end(), (folder / "stderr").read_text()]
        time.sleep(AWAY_SECONDS)

        words = [*PYVMM, "--restore", str(folder / "saved"), "--disk", disk, "--control", str(path)]
        began = time.monotonic()
        console = Console(words, folder / "stderr")
        seen["mark"] = said(console, "echo mark $mark")
        seen["seconds until it answers"] = round(time.monotonic() - began, 2)
        seen["off by"] = int(said(console, "date +%s").split()[-1]) - int(time.time())
        seen["lines after"] = said(console, LINES.format(seen["lines before"]))
        seen["complaints"] = said(
            console, "dmesg | grep -iE 'lockup|stall|I/O error|EXT4-fs error|call trace'"
        )
        seen["up"] = said(console, "cat /proc/uptime; grep -c processor /proc/cpuinfo")
        seen["stopped"] = said(console, "kill %1; wait; sync; umount /mnt && echo unmounted")
        console.type("poweroff -f")
        seen["status"] = console.end()
        seen["stderr"] = (folder / "stderr").read_text()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
