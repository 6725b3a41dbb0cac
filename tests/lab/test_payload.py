"""The embedded payload on an ordinary KVM: the lab's, which runs kernel mode natively."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tests.lab.conftest import BOOT_SECONDS, Starter

EXPECTED = {
    "guest_memfd": ("--private-mem", "kernel-enforced"),
    "memfd": ("--private-mem=memfd", "policy-enforced rehearsal"),
}
"""By backing: the option that gives it, and how the report calls the isolation."""
_SCRIPT = "".join(
    f"pyvmm {option} --disk $PYVMM_LAB_DISKS --report /tmp/report </dev/null || exit\n"
    "tr -d '\\n' </tmp/report; echo; echo end\n"
    for option, _ in EXPECTED.values()
)


def test_payload_passes_all_its_checks_on_an_ordinary_kvm(
    lab_start: Starter, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    before = hashlib.sha256(disk.read_bytes()).digest()

    run = lab_start(["sh", "-c", _SCRIPT], program=True, disks=["disk.img"])

    assert run.wait(BOOT_SECONDS) == 0, bytes(run.stdout.data)
    runs = bytes(run.stdout.data).decode().split("\nend\n")[:-1]
    for said, (backing, (_, isolation)) in zip(runs, EXPECTED.items(), strict=True):
        assert "disk-write" in said and "checks passed" in said and "not ok" not in said
        report = json.loads(said.splitlines()[-1])
        assert report["backings"]["private"] == backing
        assert report["isolation"].startswith(isolation)
        assert report["io"]["blk0"]["errors"] == 0
    assert hashlib.sha256(disk.read_bytes()).digest() == before  # it puts back what it wrote over
