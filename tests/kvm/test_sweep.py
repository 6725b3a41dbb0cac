"""A sweep whose guests run on this machine's KVM."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]


def test_guest_on_kvm_is_a_workload_as_a_replay_is(tmp_path: Path) -> None:
    results = vmm.sweep(
        {
            "policy": [
                {"use": "vmm.policy.builtin:AllowAll"},
                {"use": "vmm.policy.builtin:Quota", "parameters": {"limit": 0}},
            ],
            "workload": [{"name": "payload", "kvm": {"memory": "64M", "seconds": 60}}],
        },
        store=tmp_path / "s.sqlite",
        workers=1,
    )

    allowed, refused = results.cells
    assert (results.failed, results.missing) == ([], 0)
    assert allowed.figures["conversions"] > 10
    assert allowed.figures["guest_ns"] > 0
    assert allowed.figures["modelled_guest_ns"] > 0
    assert allowed.result is not None and allowed.result.ended is None
    # The payload can't do without: that is a result, not a failure of the sweep.
    assert refused.result is not None and refused.result.ended is not None
    assert refused.result.ended.startswith("failed: the guest reported failure code")
    assert [group.on_front for group in results.groups()] == [True, False]
