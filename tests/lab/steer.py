"""Runs inside a lab machine: boots a guest with --control, and steers it.

    python steer.py POLICIES.PY KERNEL INITRD

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
READING = (
    "while :; do dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; "
    "echo 1 >/proc/sys/vm/drop_caches; done &"
)
LOOKS = 10


def main(console_file: str, kernel: str, initrd: str) -> None:
    spec = importlib.util.spec_from_file_location("policies", console_file)
    assert spec is not None and spec.loader is not None
    policies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policies)
    folder = Path(tempfile.mkdtemp())
    (folder / "disk").write_bytes(os.urandom(4 << 20))
    path = folder / "control"

    def ask(command: str, **more: object) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(policies.COMMAND_LIMIT)
            connection.connect(str(path))
            connection.sendall(json.dumps({"command": command, **more}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
            return answer

    def ctl(*words: str) -> dict[str, Any]:
        done = subprocess.run([*PYVMM, "ctl", str(path), *words], capture_output=True, check=False)
        return {"exit": done.returncode, "answer": json.loads(done.stdout)}

    console = policies.Console(
        [*PYVMM, "--kernel", kernel, "--initrd", initrd, "--append", "quiet", "--private-mem",
         "--cpus", "2", "--disk", str(folder / "disk"), "--control", str(path), "--policy",
         "vmm.policy.builtin:Quota", "--policy-arg", "limit=80M"], folder / "stderr",
    )  # fmt: skip
    seen: dict[str, Any] = {"booted": console.expect_prompt(policies.BOOT_LIMIT) is not None}
    console.type(READING)
    console.expect_prompt(policies.COMMAND_LIMIT)
    seen["pause"] = ask("pause")
    seen["paused"] = [ask("dump-state") for _ in range(LOOKS)]
    seen["resume"] = ask("resume")
    before = seen["paused"][-1]["io"]["blk0"]["requests"]
    for _ in range(100):
        seen["going"] = ask("dump-state")
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
        seen[name] = ask("convert", kind=kind, gpa=gpa, size=size)
        seen[f"after {name}"] = ask("dump-state")
    seen["by ctl"] = ctl("convert", "share", hex(last), "0x1000")
    console.process.send_signal(signal.SIGUSR1)
    console.type("echo $((6 * 7))")
    seen["alive"] = console.expect_prompt(policies.COMMAND_LIMIT)
    seen["quit"] = ctl("quit")
    seen["status"] = console.end()
    seen["left"] = path.exists()
    seen["stderr"] = (folder / "stderr").read_text()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
