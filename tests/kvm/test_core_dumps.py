"""What the command does about core dumps of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

ROOT = Path(__file__).resolve().parents[2]
POLICY = """
import ctypes, json, resource
from vmm.policy import Allow, Policy

class Dumps(Policy):
    def __init__(self, file: str):
        self.file = file
    def on_boot(self, view):
        dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
        limit = resource.getrlimit(resource.RLIMIT_CORE)[0]
        with open(self.file, "w") as file:
            json.dump([dumpable, limit], file)
        return Allow()
"""


def dumpable_and_limit(tmp_path: Path, *options: str) -> list[int]:
    """PR_GET_DUMPABLE and RLIMIT_CORE when the guest starts, where the limit was another one."""
    (tmp_path / "dumps.py").write_text(POLICY)
    words = ["--private-mem", "--policy", f"{tmp_path}/dumps.py:Dumps"]
    words += ["--policy-arg", f"file={tmp_path}/found", f"--allow-path={tmp_path}"]
    subprocess.run(
        ["sh", "-c", 'ulimit -S -c 8; exec "$@"', "sh", sys.executable, "-m", "vmm", *words,
         *options], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    found: list[int] = json.loads((tmp_path / "found").read_text())
    return found


def test_run_with_private_memory_leaves_no_core_file_by_default(tmp_path: Path) -> None:
    assert dumpable_and_limit(tmp_path) == [0, 0]


def test_run_with_core_dumps_asked_for_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    dumpable, limit = dumpable_and_limit(tmp_path, "--core-dumps")

    assert dumpable == 1
    assert limit in (4096, 8192)  # a block of sh is 512 or 1024 bytes
