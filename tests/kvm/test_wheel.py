"""An installed wheel runs a guest: its images, its extension and its command are there."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.unit.packaging.test_wheel import ROOT, build

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]


def test_wheel_in_a_fresh_environment_runs_the_payload(tmp_path: Path) -> None:
    wheel = build("wheel", ROOT, tmp_path)
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index",
         "--no-deps", wheel],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    # What pyvmm depends on is this environment's; pyvmm itself is found before it.
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    done = subprocess.run(
        [tmp_path / "env" / "bin" / "pyvmm", "--private-mem", "--report", "report.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    where = subprocess.run(
        [python, "-c", "import vmm, vmm._firmware as f; print(vmm.__file__, f.payload_path())"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert "checks passed" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["guest"]["exit"] == "poweroff"
    assert all(path.startswith(str(site)) for path in where.stdout.split())
