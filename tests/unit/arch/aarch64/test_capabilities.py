"""The lines of `pyvmm check` on arm64: their jobs, and what serves instead of what."""

from __future__ import annotations

import pytest

from vmm.arch import architecture
from vmm.host.capability import JOBS, KERNEL_PRIVATE
from vmm.host.check import Row, judge
from vmm.host.probes.finding import no, yes

CAPABILITIES = architecture("aarch64").capabilities()
KEYS = [each.key for each in CAPABILITIES]


def can_run(job: str, *missing: str) -> bool:
    rows = tuple(
        Row(each, no("x", "y") if each.key in missing else yes("works", "seen"))
        for each in CAPABILITIES
    )
    return judge(rows, {})[job].can_run


def test_keys_are_unique_and_every_job_needs_something() -> None:
    assert len(set(KEYS)) == len(KEYS)
    assert {job for each in CAPABILITIES for job in each.needed_by} == set(JOBS)
    assert {other for each in CAPABILITIES for other in each.alternatives} <= set(KEYS)


@pytest.mark.parametrize("one", ["protected_vms", "forwarded_calls"])
def test_private_kernel_runs_with_either_way_to_keep_memory_private(one: str) -> None:
    assert can_run(KERNEL_PRIVATE, one)


def test_private_kernel_does_not_run_without_any_of_them() -> None:
    assert not can_run(KERNEL_PRIVATE, "protected_vms", "forwarded_calls")


@pytest.mark.parametrize("job", JOBS)
def test_no_job_runs_without_a_gic(job: str) -> None:
    assert not can_run(job, "gic_v3")


def test_lab_is_named_where_it_runs() -> None:
    """It doesn't on arm64 machines."""
    hints = [each.if_missing for each in CAPABILITIES if "pyvmm lab" in each.if_missing]

    assert hints
    assert all("--host" in hint for hint in hints)
    assert any("on an x86-64 machine" in hint for hint in hints)
