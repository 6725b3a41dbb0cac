"""Runs inside a lab machine: boots a guest, saves it at work, and has it go on in another pyvmm.

    python save_and_restore.py POLICIES.PY KERNEL INITRD IMAGE DISK BACKING CPUS

DISK is made, as a copy of IMAGE.
A line of JSON with what was seen goes to stdout; the test judges it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PYVMM = [sys.executable, "-sP", "/lab/project/pyvmm"]
AWAY_SECONDS = 20
SECONDS = 240.0
"""For a boot or a command: with two vCPUs, on a machine with other work, they take a minute."""
WRITING = (
    "mount -t ext4 /dev/vda /mnt; mark=$((6 * 7)); "
    "(n=0; while :; do n=$((n + 1)); echo line $n >>/mnt/log; "
    "dd if=/dev/urandom of=/mnt/data.$((n % 8)) bs=64k count=4 2>/dev/null; sync; done) &"
)


def main(
    console_file: str, kernel: str, initrd: str, image: str, disk: str, backing: str, cpus: str
) -> None:
    shutil.copy(image, disk)
    spec = importlib.util.spec_from_file_location("policies", console_file)
    assert spec is not None and spec.loader is not None
    policies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policies)
    limit = SECONDS
    folder = Path(tempfile.mkdtemp(dir=Path(disk).parent))
    path = folder / "control"

    def ctl(*words: str) -> dict[str, Any]:
        began = time.monotonic()
        done = subprocess.run([*PYVMM, "ctl", str(path), *words], capture_output=True, check=False)
        answer = json.loads(done.stdout) if done.stdout else done.stderr.decode()
        seconds = round(time.monotonic() - began, 2)
        return {"exit": done.returncode, "answer": answer, "seconds": seconds}

    def said(console: Any, command: str) -> str:
        try:
            console.type(command)
        except BrokenPipeError:
            print(json.dumps({**seen, "stderr": (folder / "stderr").read_text()}))
            raise SystemExit from None
        text: str = console.expect_prompt(limit) or "(nothing)"
        # busybox's shell asks the terminal where its cursor is.
        return text.replace("\x1b[6n", "").removeprefix(command).strip()

    seen: dict[str, Any] = {}
    words = [*PYVMM, "--kernel", kernel, "--initrd", initrd, "--append", "quiet", "--mem", "256M"]
    words += ["--cpus", cpus, "--disk", disk, "--control", str(path)]
    words += [] if backing == "none" else [f"--private-mem={backing}"]
    console = policies.Console(words, folder / "stderr")
    seen["booted"] = console.expect_prompt(limit) is not None
    said(console, WRITING)
    said(console, "sleep 3")
    seen["lines before"] = said(console, "wc -l </mnt/log")
    private = [] if backing == "none" else ["--with-private"]
    seen["dump"] = ctl("dump", str(folder.parent / "core"))
    seen["snapshot"] = ctl("snapshot", str(folder / "saved"), *private, "--then-quit")
    seen["ended"] = [console.end(), (folder / "stderr").read_text()]
    time.sleep(AWAY_SECONDS)

    words = [*PYVMM, "--restore", str(folder / "saved"), "--disk", disk, "--control", str(path)]
    began = time.monotonic()
    console = policies.Console(words, folder / "stderr")
    seen["mark"] = said(console, "echo mark $mark")
    seen["seconds until it answers"] = round(time.monotonic() - began, 2)
    seen["off by"] = int(said(console, "date +%s").split()[-1]) - int(time.time())
    said(console, "sleep 2")
    seen["lines after"] = said(console, "wc -l </mnt/log")
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
