"""How long fuzzing takes: PYVMM_FUZZ=N makes it N times as long, PYVMM_FUZZ_SEED repeats a run."""

from __future__ import annotations

import os
import random

import pytest

from tests.kvm.conftest import kvm

__all__ = ["kvm"]


@pytest.fixture(scope="session")
def fuzz_factor() -> int:
    return max(1, int(os.environ.get("PYVMM_FUZZ", "1")))


@pytest.fixture(scope="session")
def fuzz_seed() -> int:
    """New every time; a failure's message has it."""
    given = os.environ.get("PYVMM_FUZZ_SEED")
    return int(given) if given else random.SystemRandom().randrange(1 << 32)
