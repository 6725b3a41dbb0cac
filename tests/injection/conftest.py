"""What the tests of injected errors share: a usable /dev/kvm, runs without errors to compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.injection import runs
from tests.injection.runs import Seen
from tests.kvm.conftest import kvm, usable_kvm

__all__ = ["kvm", "usable_kvm"]

Without = Callable[[str], Seen]


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


@pytest.fixture
def strace() -> Iterator[None]:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    yield
