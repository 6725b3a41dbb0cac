"""Random programs against the virtual IOMMU and its model; see `iommu_model`."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.iommu_model import Model, Program
from vmm.memory.lending import LendingMemory, Mapping

EPISODES = 12
STEPS = 300


def run(seed: int, steps: int = STEPS) -> None:
    """One program. An AssertionError names the seed and the last steps."""
    program = Program(random.Random(seed))
    done: list[str] = []
    try:
        for _ in range(steps):
            done.append(program.step())
    except AssertionError as error:
        told = "\n  ".join(done[-12:])
        raise AssertionError(f"PYVMM_FUZZ_SEED={seed}: {error}, after\n  {told}") from error
    finally:
        program.close()


def test_random_programs_do_what_the_model_says(fuzz_seed: int, fuzz_factor: int) -> None:
    for number in range(EPISODES * fuzz_factor):
        run(fuzz_seed + number)


def find(monkeypatch: pytest.MonkeyPatch, target: object, name: str, fault: object) -> bool:
    """Whether programs find a fault that is put in."""
    monkeypatch.setattr(target, name, fault)
    try:
        for seed in range(EPISODES):
            run(seed)
    except AssertionError:
        return True
    return False


def test_page_that_stays_lent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(memory: LendingMemory, mapping: Mapping) -> list[object]:
        return []

    assert find(monkeypatch, LendingMemory, "take_back", forgetful)


def test_model_and_device_disagree_where_direction_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = Model.where

    def lax(model: Model, endpoint: int, iova: int, access: int) -> tuple[int, int] | None:
        return where(model, endpoint, iova, 3)

    assert find(monkeypatch, Model, "where", lax)
