"""Runs inside a lab machine: boots a guest with --control, and steers it.

    python -m tests.lab.steer KERNEL INITRD

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

READING = (
    "while :; do dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; "
    "echo 1 >/proc/sys/vm/drop_caches; done &"
)
LOOKS = 10


def main(kernel: str, initrd: str) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "disk").write_bytes(os.urandom(4 << 20))
    path = folder / "control"
    console = Console(
        pyvmm(kernel, initrd, "--private-mem", "--cpus", "2", "--disk", str(folder / "disk"),
              "--control", str(path), "--policy", "vmm.policy.builtin:Quota",
              "--policy-arg", "limit=80M"),
        folder / "stderr",
    )  # fmt: skip
    seen: dict[str, Any] = {"booted": console.expect_prompt(SECONDS) is not None}
    said(console, READING)
    seen["pause"] = ask(path, "pause", seconds=SECONDS)
    seen["paused"] = [ask(path, "dump-state", seconds=SECONDS) for _ in range(LOOKS)]
    seen["resume"] = ask(path, "resume", seconds=SECONDS)
    before = seen["paused"][-1]["io"]["blk0"]["requests"]
    for _ in range(100):
        seen["going"] = ask(path, "dump-state", seconds=SECONDS)
        if seen["going"]["io"]["blk0"]["requests"] > before:
            break

    start, size, _ = max(
        (run for run in seen["paused"][0]["pages"] if run[2] == "shared"), key=lambda run: run[1]
    )
    last = start + size - 4096  # of the bounce buffer, which is used from its start
    seen["last"] = last
    for name, kind, gpa, size in (
        ("unshare", "unshare", last, 4096),
        ("share", "share", hex(last), 4096),
        ("too much", "share", 16 << 20, 32 << 20),
        ("nowhere", "share", 1 << 40, 4096),
    ):
        seen[name] = ask(path, "convert", seconds=SECONDS, kind=kind, gpa=gpa, size=size)
        seen[f"after {name}"] = ask(path, "dump-state", seconds=SECONDS)
    seen["by ctl"] = ctl(path, "convert", "share", hex(last), "0x1000")
    console.process.send_signal(signal.SIGUSR1)
    seen["alive"] = said(console, "echo $((6 * 7))")
    seen["quit"] = ctl(path, "quit")
    seen["status"] = console.end()
    seen["left"] = path.exists()
    seen["stderr"] = (folder / "stderr").read_text()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
