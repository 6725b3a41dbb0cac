"""The fuzz targets on their corpus, and for a moment beyond it (PYVMM_FUZZ makes it longer)."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.fuzz.guided import search
from tests.fuzz.oracles import Resources
from tests.fuzz.targets import TARGETS, corpus
from vmm.conversion.transaction import Converter
from vmm.core.ranges import Range
from vmm.memory.lending import READ, WRITE, IommuMemory, LendingMemory, _Plan


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_inputs_are_survived_and_leave_nothing_behind(name: str) -> None:
    inputs = corpus(name)
    for data in inputs:
        TARGETS[name](data)  # everything is imported now
    resources = Resources()

    for _ in range(5):
        for data in inputs:
            TARGETS[name](data)
        resources.assert_given_back()


def test_target_that_keeps_memory_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    doorbell = TARGETS["doorbell"]

    def leaking(data: bytes) -> None:
        kept.append(b"x" * (4 << 20))
        doorbell(data)

    monkeypatch.setitem(TARGETS, "doorbell", leaking)

    with pytest.raises(AssertionError, match="resident memory has grown"):
        test_corpus_inputs_are_survived_and_leave_nothing_behind("doorbell")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_generated_inputs_are_survived(name: str, fuzz_seed: int, fuzz_factor: int) -> None:
    lines = search(name, 150 * fuzz_factor, fuzz_seed)

    assert len(lines.all) > 100, "the target has to get somewhere for this to mean anything"


@pytest.mark.parametrize("name", ["hypercall", "fault", "doorbell"])
def test_target_notices_a_request_that_is_not_validated(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trust(converter: Converter, request: object) -> Range:
        return Range(request.gpa, request.pages * 4096)  # type: ignore[attr-defined]

    monkeypatch.setattr(Converter, "_validate", trust)

    with pytest.raises(Exception) as caught:
        for data in corpus(name):
            TARGETS[name](data)
    assert not isinstance(caught.value, ValueError) or "range" in str(caught.value)


def test_iommu_target_notices_pages_that_stay_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LendingMemory, "take_back", lambda memory, mapping: [])

    with pytest.raises(AssertionError):
        for data in corpus("iommu"):
            TARGETS["iommu"](data)


def test_dma_target_notices_a_translation_that_ignores_the_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = IommuMemory._begin

    def lax(memory: IommuMemory, pieces: list[int], access: int) -> _Plan:
        return begin(memory, pieces, READ | WRITE)

    monkeypatch.setattr(IommuMemory, "_begin", lax)

    with pytest.raises(AssertionError, match="are not mapped, and were reached"):
        for data in corpus("dma"):
            TARGETS["dma"](data)


def test_dma_target_notices_bytes_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    write = IommuMemory._write

    def astray(memory: IommuMemory, plan: _Plan, data: bytes) -> None:
        write(memory, plan, data)
        memory._memory.shared.pwrite(b"x", 0)

    monkeypatch.setattr(IommuMemory, "_write", astray)

    with pytest.raises(AssertionError, match="another byte has changed"):
        for data in corpus("dma"):
            TARGETS["dma"](data)


def test_image_target_notices_an_unforeseen_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*arguments: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr("vmm.arch.x86_64.kernel.parse_elf", careless)

    with pytest.raises(IndexError):
        TARGETS["image"](corpus("image")[0])


def test_finding_comes_with_its_line_for_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        raise AssertionError("found")

    monkeypatch.setitem(TARGETS, "fault", broken)
    monkeypatch.setattr("tests.fuzz.guided.inputs", lambda name: st.binary(max_size=9))
    monkeypatch.setattr("tests.fuzz.guided.corpus", lambda name: [])

    with pytest.raises(AssertionError, match="found") as caught:
        search("fault", 5, 1)
    assert any(note.startswith("for the corpus:") for note in caught.value.__notes__)
