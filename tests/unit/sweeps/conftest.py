"""A folder with a trace, policies, and a sweep over them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.trace import Events
from tests.unit.cli.conftest import command  # noqa: F401  # a fixture
from vmm.trace.layout import Kind

POLICIES = """
from vmm.policy import Allow, Deny, Policy

class Some(Policy):
    def __init__(self, most: int = 4):
        self.left = most
    def on_share(self, event, view):
        self.left -= 1
        return Allow() if self.left >= 0 else Deny()

class Broken(Policy):
    def on_share(self, event, view):
        print("about to break")
        return missing_name
"""
SWEEP = """
[[policy]]
use = "vmm.policy.builtin:AllowAll"

[[policy]]
use = "p.py:Some"
parameters = { most = [1, 3] }

[[workload]]
name = "boot"
replay = "t"
"""


def write_trace(folder: Path, shares: int = 6, took: float = 1.0) -> Path:
    """A run in which a page is shared every 10 ms."""
    made = Events((0, 64, "private"))
    for number in range(shares):
        made.convert(Kind.SHARE, 10 * number, 2 * number, 1, took)
    return made.write(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With `t`, `p.py` and `s.toml`. A sweep has one process, which starts in half a second."""
    monkeypatch.setattr("vmm.sweeps.executor.default_workers", lambda: 1)
    write_trace(tmp_path / "t")
    (tmp_path / "p.py").write_text(POLICIES)
    (tmp_path / "s.toml").write_text(SWEEP)
    return tmp_path


@pytest.fixture(autouse=True)
def no_modules_of_other_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A policy file's folder stays on the path of the process that has loaded it, as it should in
    a run; another test's `p.py` would be found there."""
    base = str(tmp_path_factory.getbasetemp())
    monkeypatch.setattr(sys, "path", [each for each in sys.path if not each.startswith(base)])
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(base):
            monkeypatch.delitem(sys.modules, name)
