"""`pyvmm bench` on this machine's KVM: every section comes to an end and has its subjects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmm.cli.main import main

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]


@pytest.mark.parametrize(
    ("section", "subjects"),
    [
        ("accessors", {"C memcpy", "C pread/pwrite", "GuestMemory", "fd2fd", "hva", "C splice"}),
        ("conversions", {"share and unshare", "the same, 4 threads", "bare holes"}),
        ("exits", {"C loop", "Vcpu.run", "run loop"}),
        ("disk", {"pyvmm auto", "pyvmm pread", "pyvmm fd2fd", "pyvmm mmap"}),
        ("start-up", {"python, one byte", "pyvmm"}),
        ("memory", {"pyvmm's own, at most", "both sides together, at most"}),
    ],
)
def test_section_measures_all_its_subjects(
    section: str, subjects: set[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"

    words = ["bench", "--quick", "--rounds", "1", "--only", section, "--json", str(out)]
    assert main(words) == 0

    data = json.loads(out.read_text())
    assert {one["subject"] for one in data["series"]} >= subjects
    assert all(sample > 0 for one in data["series"] for sample in one["samples"])
    assert data["host"]["kvm"] is True
