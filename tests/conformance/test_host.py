"""Every case in every cell, as `pyvmm selftest` runs them."""

from __future__ import annotations

import pytest

from tests.conformance.conftest import why_lacking
from vmm.arch import architecture
from vmm.selftest.case import Case
from vmm.selftest.cases.all_cases import all_cases
from vmm.selftest.entries import Combination, combinations
from vmm.selftest.platform import KvmPlatform
from vmm.selftest.runner import run_case


@pytest.mark.kvm
@pytest.mark.parametrize("combination", combinations(architecture().schemes), ids=str)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_case_holds(case: Case, combination: Combination, platform: KvmPlatform) -> None:
    missing = why_lacking(platform, combination)
    if missing is not None:
        pytest.skip(f"{combination}: {missing}")

    result = run_case(platform, combination, case)

    if result.status == "skip":
        pytest.skip(result.reason)
    assert result.status == "pass", result.reason
