"""A core dump of the VMM has no guest memory in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# The guest's bytes come out of a file, so that no Python object holds them; ours is an object.
GUEST = """
import os, sys
from kvm_bindings import fdops
from vmm.memory.backings.memfd import MemfdBacking
source = os.open(sys.argv[1], os.O_RDONLY)
private = MemfdBacking(1 << 20, "guest")
fdops.pread_to_address(source, private.hva, 4096, 0)
engine = fdops.map_shared(private.fd, 1 << 20)
ours = "-".join(["this", "is", "the", "process", "itself"])
if "forbid" in sys.argv:
    fdops.forbid_core_dumps()
print("ready", flush=True)
sys.stdin.read()
"""
OURS = b"this-is-the-process-itself"
MARKER = b"private-word-of-the-guest " * 100


@pytest.mark.parametrize("options", [[], ["forbid"]], ids=["core-dumps", "default"])
def test_core_dump_has_the_process_and_no_guest_memory(tmp_path: Path, options: list[str]) -> None:
    gcore = shutil.which("gcore")
    if gcore is None:
        pytest.skip("gcore is missing: install gdb")
    (tmp_path / "guest").write_bytes(MARKER)
    command = [sys.executable, "-c", GUEST, str(tmp_path / "guest"), *options]

    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        dumped = subprocess.run(
            [gcore, "-o", str(tmp_path / "core"), str(child.pid)],
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        child.communicate()

    core = tmp_path / f"core.{child.pid}"
    if not core.exists():
        pytest.skip(f"gcore may not look into another process here: {dumped.stderr!r}")
    content = core.read_bytes()
    assert content.startswith(b"\x7fELF")
    assert OURS in content
    assert MARKER[:64] not in content
