"""Runs inside a lab machine: boots a guest to its shell, and dumps it.

    python dump_guest.py POLICIES.PY KERNEL INITRD BACKING CPUS CORE [WHOLE]

WHOLE is a dump with private memory. A line of JSON goes to stdout: what the guest says of itself,
and the answers.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PYVMM = [sys.executable, "-sP", "/lab/project/pyvmm"]
SECONDS = 240.0
MARK = "here is the guest"
QUESTIONS = {
    "release": "uname -r",
    "sleeper": "sleep 4242 & echo $!",
    "mark": f"echo {MARK} >/dev/kmsg; echo done",
}


def main(
    console_file: str, kernel: str, initrd: str, backing: str, cpus: str, core: str, whole: str = ""
) -> None:
    spec = importlib.util.spec_from_file_location("policies", console_file)
    assert spec is not None and spec.loader is not None
    policies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(policies)
    folder = Path(tempfile.mkdtemp())
    path = folder / "control"
    words = [*PYVMM, "--kernel", kernel, "--initrd", initrd, "--append", "quiet", "--mem", "192M"]
    words += ["--cpus", cpus, "--control", str(path)]
    words += [] if backing == "none" else [f"--private-mem={backing}"]
    console = policies.Console(words, folder / "stderr")
    seen: dict[str, Any] = {"booted": console.expect_prompt(SECONDS) is not None}
    for name, question in QUESTIONS.items() if seen["booted"] else ():
        console.type(question)
        said = console.expect_prompt(SECONDS) or "(nothing)"
        # busybox's shell asks the terminal where its cursor is.
        seen[name] = said.replace("\x1b[6n", "").removeprefix(question).strip()

    def ctl(*verb: str) -> Any:
        done = subprocess.run([*PYVMM, "ctl", str(path), *verb], capture_output=True, check=False)
        return json.loads(done.stdout) if done.stdout else done.stderr.decode()

    seen["core"] = ctl("dump", core)
    if whole:
        seen["whole"] = ctl("dump", whole, "--with-private")
    seen["quit"] = ctl("quit")
    seen["status"], seen["stderr"] = console.end(), (folder / "stderr").read_text()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
