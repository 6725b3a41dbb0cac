"""The conformance suite and random programs on the lab's kernels, where KVM runs as on hardware."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab.conftest import Starter

# Booting, one cell or two, and some programs, with other work on the machine's cores.
SECONDS = 400.0
HYPERCALLS = "tests.fuzz.hypercall_programs"
KERNEL, CONVERSION = "tests.fuzz.kernel_programs", "tests.fuzz.conversion_programs"


@pytest.mark.parametrize(
    ("host", "cells", "programs"),
    [
        ("stock", ["cbit/guest_memfd", "remap/memfd"], 40),
        ("sw-protected", ["attributes/guest_memfd-plain"], 80),
    ],
)
def test_private_memory_is_in_order_on_the_labs_kernel(
    host: str, cells: list[str], programs: int, lab_start: Starter, tmp_path: Path
) -> None:
    only = " ".join(f"--only {cell}" for cell in cells)
    script = (
        f"python3 -m {HYPERCALLS} --count 300 && "
        f"python3 -m {KERNEL} --count {programs} && "
        f"python3 -m {CONVERSION} --kvm --count {programs} && "
        f"pyvmm selftest {only} --json m.json"
    )
    words = ["sh", "-c", script]
    run = lab_start(words, program=True, host=host, outputs=[tmp_path / "m.json"], cpus=1)

    status = run.wait(SECONDS)

    output = bytes(run.stdout.data).decode() + bytes(run.stderr.data).decode()
    assert status == 0, output  # the seeds are in it
    written = run.collect("m.json")
    summary = json.loads(written)["summary"]
    assert summary["fail"] == 0
    assert summary["pass"] > 30 * len(cells), output
