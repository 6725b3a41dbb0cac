"""The command in this process, on a host without KVM: nothing here may get as far as a guest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmm.cli.main import main
from vmm.host import kvm as host


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr; fails when there is anything else."""
        assert self.out == ""
        assert self.err.startswith("pyvmm: ")
        assert self.err.endswith("\n")
        assert len(self.err.splitlines()) == 1, self.err
        assert "Traceback" not in self.err
        return self.err[len("pyvmm: ") : -1]


Command = Callable[..., Result]


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Runs `pyvmm ARGUMENTS` in an empty directory. Bad input (2) must be found before the host
    is asked for KVM, which fails here (3)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host.open_kvm, "__defaults__", (str(tmp_path / "no-kvm"),))

    def run(*arguments: str) -> Result:
        status = main(arguments)
        captured = capfd.readouterr()
        return Result(status, captured.out, captured.err)

    return run
