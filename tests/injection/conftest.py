"""What the tests of injected errors share: a usable /dev/kvm, runs without errors to compare."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.injection import injecting, runs
from tests.injection.runs import Seen
from tests.kvm.conftest import kvm, usable_kvm

__all__ = ["kvm", "usable_kvm"]

Without = Callable[[str], Seen]


@pytest.fixture(scope="package", autouse=True)
def _no_process_stays() -> Iterator[None]:
    """Other tests look at what children there are."""
    yield
    injecting.cool_down()


@pytest.fixture(scope="session")
def without(tmp_path_factory: pytest.TempPathFactory) -> Without:
    """A scenario's run with nothing injected; once for all tests."""
    known: dict[str, Seen] = {}

    def seen(scenario: str) -> Seen:
        if scenario not in known:
            known[scenario] = runs.seen(scenario, tmp_path_factory.mktemp(scenario))
            assert known[scenario].ended.status == 0, known[scenario].ended.errors
        return known[scenario]

    return seen


@pytest.fixture(scope="session")
def strace() -> None:
    """Skips a test where strace can't trace."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    command = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=openat", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode:
        pytest.skip(f"needs a strace that may trace: {tried.stderr.strip()}")
