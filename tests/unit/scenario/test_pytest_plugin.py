"""The pytest plugin: as a user's test run sees it, in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = "vmm.scenario.pytest_plugin"

USERS_TEST = """
import errno
from vmm.policy import Deny, Policy
from vmm.policy.builtin import Quota
from vmm.scenario import Share


class Never(Policy):
    def on_share(self, event, view):
        return Deny(errno.EPERM)


def guest(guest, pages=1):
    for _ in range(pages):
        assert (yield Share(guest.allocate(4096))) == -errno.EPERM


def test_never_shares(pyvmm_scenario):
    result = pyvmm_scenario(guest, Never(), pages=3)
    assert result.figures["denied"] == 3


def test_quota_holds(pyvmm_scenario):
    result = pyvmm_scenario("streaming-dma", Quota(1 << 20), seed=4, requests=100)
    assert result.figures["shared_bytes_peak"] == 1 << 20
"""
USERS_MACHINE_TEST = """
import vmm.scenario.pytest_plugin as plugin

plugin.KVM = "/nowhere/kvm"


def test_machine(pyvmm_machine):
    raise AssertionError("not run")
"""
PLAIN_TEST = """
import sys


def test_plugin_brings_nothing_along():
    mine = [name for name in sys.modules if name.startswith(("vmm", "numpy", "hypothesis"))]
    assert sorted(mine) == ["vmm", "vmm.core", "vmm.core.lean_typing", "vmm.scenario",
                            "vmm.scenario.pytest_plugin"]
"""


def users_run(folder: Path, text: str) -> str:
    """What a user's `pytest -rs` says, in `folder`, with the plugin as its entry point gives it."""
    (folder / "test_mine.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-W", "error", "-p", PLUGIN, "test_mine.py"],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    named = project["entry-points"]["pytest11"]["pyvmm"]

    assert hasattr(importlib.import_module(named), "pyvmm_scenario")


def test_policy_has_unit_tests_in_a_users_folder(tmp_path: Path) -> None:
    said = users_run(tmp_path, USERS_TEST)

    assert "2 passed" in said, said


def test_machine_without_kvm_is_skipped_with_the_reason(tmp_path: Path) -> None:
    said = users_run(tmp_path, USERS_MACHINE_TEST)

    assert "1 skipped" in said, said
    assert "needs KVM: /nowhere/kvm: No such file or directory" in said


def test_plugin_imports_nothing_until_a_fixture_is_used(tmp_path: Path) -> None:
    said = users_run(tmp_path, PLAIN_TEST)

    assert "1 passed" in said, said
