"""The embedded payload on an ordinary KVM: the lab's, which runs kernel mode natively."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.lab.conftest import BOOT_SECONDS, Starter


@pytest.mark.parametrize(
    ("option", "backing", "isolation"),
    [
        ("--private-mem", "guest_memfd", "kernel-enforced"),
        ("--private-mem=memfd", "memfd", "policy-enforced rehearsal"),
    ],
)
def test_payload_passes_all_its_checks_on_an_ordinary_kvm(
    option: str, backing: str, isolation: str, lab_start: Starter, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    before = hashlib.sha256(disk.read_bytes()).digest()

    run = lab_start([option, "--disk", "disk.img", "--report", "report.json"])

    assert run.wait(BOOT_SECONDS) == 0, bytes(run.stdout.data)
    output = bytes(run.stdout.data).decode()
    assert "disk-write" in output and "checks passed" in output and "not ok" not in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["backings"]["private"] == backing
    assert report["isolation"].startswith(isolation)
    assert report["io"]["blk0"]["errors"] == 0
    assert hashlib.sha256(disk.read_bytes()).digest() == before  # it puts back what it wrote over
