"""The cases of protected guests on a model of pKVM, and that each kind of fault makes one fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvm_bindings import mapped
from tests.support.protected import ProtectedGuest
from tests.support.protected_platform import ProtectedPlatform
from vmm.memory.backings.protected_memfd import ProtectedMemfdBacking
from vmm.selftest.cases.all_cases import all_cases
from vmm.selftest.entries import Combination
from vmm.selftest.runner import run_matrix

PKVM = Combination("pkvm", "memfd-protected")


def results() -> dict[str, tuple[str, str]]:
    """Status and reason of every case."""
    return {
        result.case.name: (result.status, result.reason)
        for result in run_matrix(ProtectedPlatform(), all_cases(), [PKVM])
    }


def test_cases_of_protected_guests_hold_and_all_others_say_why_they_are_skipped() -> None:
    found = results()

    own = {name for name in found if name.startswith("protected.")}
    assert len(own) >= 7
    assert {name: found[name] for name in own} == dict.fromkeys(own, ("pass", ""))
    others = {name: each for name, each in found.items() if name not in own}
    assert {status for status, _ in others.values()} == {"skip"}
    assert all(reason for _, reason in others.values())


def nothing(*arguments: Any) -> None:
    """What a missing step does."""


def yes(addresses: list[int]) -> list[bool]:
    return [True] * len(addresses)


@pytest.mark.parametrize(
    ("owner", "name", "broken", "expected"),
    [
        (ProtectedGuest, "unshare", nothing, "protected.kept_pages_are_out_of_reach"),
        (ProtectedGuest, "unshare", nothing, "protected.page_taken_back_is_out_of_reach"),
        (ProtectedGuest, "share", nothing, "protected.shared_page_is_one_page"),
        (ProtectedMemfdBacking, "seal", nothing, "protected.own_fd_is_shut"),
        (ProtectedMemfdBacking, "seal", nothing, "protected.kept_pages_are_out_of_reach"),
        (mapped, "probe_mapped", yes, "protected.neighbours_stay_private"),
    ],
)  # fmt: skip
def test_fault_makes_a_case_fail(
    owner: Any,
    name: str,
    broken: Callable[..., Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, broken)

    assert results()[expected][0] == "fail"
