"""A few random programs in every test run; more with PYVMM_FUZZ or the modules' own commands."""

from __future__ import annotations

import dataclasses

import pytest

from kvm_bindings.x86_64 import System
from tests.fuzz.conversion_programs import Cell, fake_cells, kvm_cells, run_many
from tests.fuzz.kernel_programs import Comparison
from tests.support.fake_kvm.guest_memfd import FakeGuestMemfd
from tests.support.fake_kvm.slots import SlotTable
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory


@pytest.mark.kvm
def test_kernel_and_its_model_say_the_same(kvm: System, fuzz_seed: int, fuzz_factor: int) -> None:
    comparison = Comparison(kvm)

    for number in range(100 * fuzz_factor):
        divergence = comparison.compare(fuzz_seed, number)
        assert divergence is None, str(divergence)


def test_conversions_on_the_model_go_as_the_reference_says(
    fuzz_seed: int, fuzz_factor: int
) -> None:
    _, divergence = run_many(fake_cells(), fuzz_seed, 500 * fuzz_factor)

    assert divergence is None, str(divergence)


@pytest.mark.kvm
def test_conversions_on_kvm_go_as_the_reference_says(
    kvm: System, fuzz_seed: int, fuzz_factor: int
) -> None:
    _, divergence = run_many(kvm_cells(kvm), fuzz_seed, 100 * fuzz_factor)

    assert divergence is None, str(divergence)


# -- that a divergence would be found -----------------------------------------------------------


def found(cells: list[Cell]) -> str:
    """The divergence that a fault causes within some hundred programs."""
    _, divergence = run_many(cells, 1, 300)
    assert divergence is not None, "the fault went unnoticed"
    return str(divergence)


@pytest.mark.parametrize("side", ["discard_private", "discard_shared"])
def test_missing_discard_is_found(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuestMemory, side, lambda memory, area: None)

    assert "the reference says" in found(fake_cells())


def test_discard_of_one_page_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GuestMemory.discard_shared

    def greedy(memory: GuestMemory, area: Range) -> None:
        end = min(area.end + 4096, memory.ram[-1].end)
        honest(memory, Range(area.start, end - area.start))

    monkeypatch.setattr(GuestMemory, "discard_shared", greedy)

    assert "the reference says" in found(fake_cells())


def test_host_access_let_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuestMemory, "_require_shared", lambda memory, gpa, size: None)

    assert "host access allowed" in found(fake_cells())


def wrong_bind(memfd: FakeGuestMemfd, slot: int, offset: int, size: int) -> int:
    return 0


def wrong_overlap(table: SlotTable, area: Range, number: int) -> bool:
    return False


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (FakeGuestMemfd, "bind", wrong_bind),
        (FakeGuestMemfd, "mappable", property(lambda memfd: False)),
        (FakeGuestMemfd, "populate", lambda memfd, offset: None),
        (SlotTable, "_overlaps", wrong_overlap),
    ],
)
def test_wrong_model_is_found(
    owner: type, name: str, wrong: object, kvm: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    comparison = Comparison(kvm)

    divergences = (comparison.compare(1, number) for number in range(1000))
    divergence = next((each for each in divergences if each is not None), None)

    assert divergence is not None
    assert "BUT THE MODEL SAYS" in str(divergence)


@pytest.mark.kvm
def test_model_with_other_flags_than_the_kernels_is_found(kvm: System) -> None:
    comparison = Comparison(kvm)
    types = comparison._model.kernel.vm_types
    for number, kind in types.items():
        types[number] = dataclasses.replace(kind, guest_memfd_flags=kind.guest_memfd_flags ^ 1)

    assert any(comparison.compare(1, number) for number in range(1000))
