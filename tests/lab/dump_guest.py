"""Runs inside a lab machine: boots a guest to its shell, and dumps it.

    python -m tests.lab.dump_guest KERNEL INITRD BACKING CPUS CORE [WHOLE]

WHOLE is a dump with private memory. A line of JSON goes to stdout: what the guest says of itself,
and the answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.policies import Console
from tests.lab.inside import SECONDS, ctl, pyvmm, said

MARK = "here is the guest"
QUESTIONS = {
    "release": "uname -r",
    "sleeper": "sleep 4242 & echo $!",
    "mark": f"echo {MARK} >/dev/kmsg; echo done",
}


def main(kernel: str, initrd: str, backing: str, cpus: str, core: str, whole: str = "") -> None:
    folder = Path(tempfile.mkdtemp())
    path = folder / "control"
    words = pyvmm(kernel, initrd, "--mem", "192M", "--cpus", cpus, "--control", str(path))
    words += [] if backing == "none" else [f"--private-mem={backing}"]
    console = Console(words, folder / "stderr")
    seen: dict[str, Any] = {"booted": console.expect_prompt(SECONDS) is not None}
    for name, question in QUESTIONS.items() if seen["booted"] else ():
        seen[name] = said(console, question)
    _, seen["core"] = ctl(path, "dump", core)
    if whole:
        _, seen["whole"] = ctl(path, "dump", whole, "--with-private")
    ctl(path, "quit")
    seen["status"], seen["stderr"] = console.end(), (folder / "stderr").read_text()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
