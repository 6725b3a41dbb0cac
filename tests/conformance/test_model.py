"""The cases on the model of KVM, which has what this machine's KVM may lack; and that each kind
of fault makes cases fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.fake_kvm import FakeKernel, FakeVm
from tests.support.fake_platform import FakePlatform
from vmm.conversion.schemes.attributes import AttributesScheme
from vmm.conversion.transaction import Converter
from vmm.core.ranges import Range
from vmm.memory.guest_memory import GuestMemory, PageState
from vmm.policy import Allow
from vmm.policy.hooks import Hooks
from vmm.selftest.case import CASES, Case
from vmm.selftest.cases.all_cases import all_cases
from vmm.selftest.entries import Combination, combinations
from vmm.selftest.runner import Result, lacking, run_case, run_matrix

# Minutes of copying page by page, where the kernel takes milliseconds.
SLOW = ("patterns.several_vcpus", "patterns.several_memslots", "memslots.many_memslots")
QUICK = [case for case in all_cases() if case.name not in SLOW]
MODELLED = [each for each in combinations() if each.backing != "memfd-hugetlb"]


def platform_for(combination: Combination) -> FakePlatform:
    in_place = combination.scheme == "in-place"
    return FakePlatform(FakeKernel.with_in_place() if in_place else FakeKernel.sw_protected())


def failing(combination: Combination) -> dict[str, str]:
    """The cases that fail in a cell of the model, with the reasons."""
    results = run_matrix(platform_for(combination), QUICK, [combination])
    return {result.case.name: result.reason for result in results if result.status == "fail"}


@pytest.mark.parametrize("combination", MODELLED, ids=str)
def test_cases_hold_on_the_model(combination: Combination) -> None:
    assert lacking(platform_for(combination), combination) is None

    assert failing(combination) == {}


def test_many_memslots_hold_on_the_model() -> None:
    case = next(case for case in all_cases() if case.name == "memslots.many_memslots")
    combination = Combination("remap", "memfd")

    result = run_case(platform_for(combination), combination, case)

    assert (result.status, result.reason) == ("pass", "")


def test_cases_have_names_and_titles_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == len({c.title for c in CASES})


# -- that cases can fail --------------------------------------------------------------------------


def nothing(*arguments: Any) -> None:
    """What a missing step does."""


def leave_states(memory: GuestMemory, state: PageState, runs: object = None) -> None:
    memory._conversions.clear()


def allow(hooks: Hooks, *arguments: Any) -> Allow:
    return Allow()


def trust_request(converter: Converter, request: Any) -> Range:
    return Range(request.gpa, min(request.pages, 4) * 4096)


def hypocrite(vm: FakeVm, gpa: int, size: int, attributes: int) -> None:
    """Says yes to attributes, and forgets."""


CBIT, ATTRIBUTES = Combination("cbit", "memfd"), Combination("attributes", "guest_memfd-plain")


@pytest.mark.parametrize(
    ("owner", "name", "broken", "combination", "expected"),
    [
        (GuestMemory, "discard_private", nothing, CBIT,
         "contents.private_words_do_not_come_back"),
        (GuestMemory, "discard_private", nothing, ATTRIBUTES,
         "residency.share_frees_private_side"),
        (GuestMemory, "discard_shared", nothing, CBIT,
         "contents.shared_words_do_not_come_back"),
        (GuestMemory, "_require_shared", nothing, CBIT,
         "contents.host_access_to_private_refused"),
        (GuestMemory, "finish_conversion", leave_states, CBIT, "contents.shared_words_are_seen"),
        (Hooks, "decide", allow, CBIT, "transactions.policy_refusal_changes_nothing"),
        (Converter, "_validate", trust_request, CBIT,
         "transactions.bad_requests_change_nothing"),
        (Converter, "_revert", nothing, ATTRIBUTES, "transactions.failed_share_is_taken_back"),
        (AttributesScheme, "apply", nothing, ATTRIBUTES, "contents.shared_words_are_seen"),
        (FakeVm, "set_memory_attributes", hypocrite, ATTRIBUTES,
         "faults.private_page_without_memslot"),
    ],
)  # fmt: skip
def test_fault_makes_a_case_fail(
    owner: type,
    name: str,
    broken: Callable[..., Any],
    combination: Combination,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, broken)

    assert expected in failing(combination)


def test_case_that_raises_is_a_failure_with_its_place() -> None:
    def broken(cell: object) -> None:
        raise RuntimeError("out of order")

    result = run_case(platform_for(CBIT), CBIT, Case("x.y", "", broken))

    assert result.status == "fail"
    assert result.reason.startswith("RuntimeError: out of order (test_model.py:")


def test_cell_that_the_host_lacks_is_skipped_with_the_reason() -> None:
    results: list[Result] = list(run_matrix(FakePlatform(), all_cases()[:2], [ATTRIBUTES]))

    assert [result.status for result in results] == ["skip", "skip"]
    assert "KVM_CREATE_VM(type=1) failed: EINVAL" in results[0].reason
    assert "CONFIG_KVM_SW_PROTECTED_VM" in results[0].reason
