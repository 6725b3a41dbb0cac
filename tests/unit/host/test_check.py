"""`pyvmm check`'s judgement: which jobs run when what is missing, and the JSON's shape."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from kvm_bindings import KvmError
from kvm_bindings.x86_64 import System
from tests.support.fake_host import FakeHost
from tests.support.x86 import X86
from vmm.core.errors import HostError
from vmm.host import kvm as host
from vmm.host.capability import JOBS, MAIN_JOB, Capability
from vmm.host.check import Choice, HostCheck, Row, check_host, judge, probed
from vmm.host.probes.finding import Finding, broken, no, unknown, yes
from vmm.memory.lending import can_lend

CAPABILITIES = X86.capabilities()
FINE = yes("works", "seen")
CHOICE = Choice("cbit", "memfd", "policy-refused", {"attributes": "no such VM type"})


def rows(**findings: Finding) -> tuple[Row, ...]:
    """All capabilities, working but for those named."""
    return tuple(Row(each, findings.get(each.key, FINE)) for each in CAPABILITIES)


def host_with(**findings: Finding) -> HostCheck:
    found = rows(**findings)
    return HostCheck(found, judge(found, {MAIN_JOB: CHOICE}), None)


def assert_complete(found: HostCheck) -> dict[str, Any]:
    """The JSON, after a look at every key it promises."""
    data: dict[str, Any] = json.loads(json.dumps(found.as_json()))
    assert set(data) == {
        "format", "kernel", "machine", "exit_status", "error", "jobs", "capabilities",
    }  # fmt: skip
    assert list(data["jobs"]) == ["kernel_private", "payload_private", "kernel"]
    for job in data["jobs"].values():
        assert set(job) == {
            "title", "can_run", "missing", "backing", "host_access", "scheme", "lends",
            "schemes_not_taken",
        }  # fmt: skip
        assert job["can_run"] == (job["missing"] == [])
    assert [each["key"] for each in data["capabilities"]] == [each.key for each in CAPABILITIES]
    for each in data["capabilities"]:
        assert set(each) == {
            "key", "capability", "status", "result", "evidence", "enables", "if_missing",
            "needed_by", "alternatives", "data",
        }  # fmt: skip
        assert each["status"] in ("yes", "no", "broken", "unknown")
        assert all(each[name] for name in ("result", "evidence", "enables", "if_missing"))
    return data


def test_capability_keys_are_unique_and_their_jobs_exist() -> None:
    keys = [each.key for each in CAPABILITIES]

    assert len(set(keys)) == len(keys)
    assert {job for each in CAPABILITIES for job in each.needed_by} == set(JOBS)


def test_host_with_everything_runs_every_job_and_ends_with_0() -> None:
    found = host_with()

    assert found.exit_status == 0
    assert all(job.can_run for job in found.jobs.values())
    assert found.jobs[MAIN_JOB].choice == CHOICE
    assert_complete(found)


@pytest.mark.parametrize("finding", [no("x", "y"), broken("x", "y"), unknown("y")])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda each: each.key)
def test_what_is_missing_stops_the_jobs_that_need_it_and_no_other(
    capability: Capability, finding: Finding
) -> None:
    found = host_with(**{capability.key: finding})

    stopped = {name for name, job in found.jobs.items() if not job.can_run}
    assert stopped == set(capability.needed_by)
    assert all(found.jobs[name].missing == (capability.key,) for name in stopped)
    assert all(found.jobs[name].choice is None for name in stopped)
    assert found.exit_status == (3 if MAIN_JOB in capability.needed_by else 0)


@pytest.mark.parametrize(
    ("working", "can_run"), [((), False), (("a",), True), (("b",), True), (("a", "b"), True)]
)
def test_job_that_needs_one_of_two_lines_runs_with_either(
    working: tuple[str, ...], can_run: bool
) -> None:
    either = [
        Capability(key, key, lambda system: FINE, "x", "y", (MAIN_JOB,), (other,))
        for key, other in (("a", "b"), ("b", "a"))
    ]
    found = tuple(Row(each, FINE if each.key in working else no("x", "y")) for each in either)

    job = judge(found, {})[MAIN_JOB]

    assert job.can_run == can_run
    assert job.missing == (() if can_run else ("a", "b"))


def test_payload_needs_neither_hypercalls_nor_native_kernel_mode() -> None:
    found = host_with(hypercall_exits=broken("never return", "y"), kernel_mode=broken("x", "y"))

    assert found.jobs["payload_private"].can_run
    assert not found.jobs["kernel"].can_run
    assert found.exit_status == 3


def test_advice_is_given_for_what_is_missing_or_broken_only() -> None:
    capability = CAPABILITIES[0]

    assert Row(capability, FINE).advice == Row(capability, unknown("y")).advice == ""
    assert Row(capability, no("x", "y")).advice == capability.if_missing
    assert Row(capability, broken("x", "y")).advice == capability.if_missing


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HostError("no room"), "no"),
        (KvmError("KVM_CREATE_VM", errno.EBUSY), "broken"),
        (OSError(errno.EMFILE, "Too many open files"), "broken"),
    ],
)
def test_error_in_a_probe_is_a_finding(error: Exception, status: str) -> None:
    def probe(system: System) -> Finding:
        raise error

    finding = probed(probe, FakeHost().as_system())

    assert (finding.status, finding.evidence) == (status, str(error))


# -- hosts without a usable KVM -------------------------------------------------------------------


@pytest.mark.parametrize("device", ["no-kvm", "/dev/null"])
def test_host_without_kvm_gets_a_complete_answer_in_the_usual_words(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = str(tmp_path / device)
    monkeypatch.setattr(host.open_kvm, "__defaults__", (path,))
    with pytest.raises(HostError) as usual:
        host.open_kvm(X86)

    found = check_host(X86)

    assert found.exit_status == 3
    data = assert_complete(found)
    assert data["error"] == data["capabilities"][0]["evidence"] == str(usual.value)
    assert {each["status"] for each in data["capabilities"][1:]} == {"unknown"}
    assert not any(job["can_run"] for job in data["jobs"].values())


def test_kvm_that_lacks_basics_is_still_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHost(capabilities={33: 0})  # KVM_CAP_PIT2
    monkeypatch.setattr(X86, "open_system", lambda path: fake)
    working = [replace(each, probe=lambda system: FINE) for each in CAPABILITIES[1:]]
    monkeypatch.setattr(X86, "capabilities", lambda: (CAPABILITIES[0], *working))

    found = check_host(X86)

    assert found.rows[0].finding.result == "lacks KVM_CAP_PIT2"
    assert found.rows[1].works
    assert found.exit_status == 3
    assert found.error is None
    assert fake.closed == 1


def test_host_on_which_no_vm_can_be_made_gets_a_complete_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeHost()
    fake.vm_types = set()
    monkeypatch.setattr(X86, "open_system", lambda path: fake)

    found = check_host(X86)

    assert found.exit_status == 3
    assert_complete(found)


def test_backings_that_the_host_cannot_reach_lend_nothing() -> None:
    """Strict guest_memfd keeps the host out, and in place it is KVM that refuses."""
    from vmm.memory.backing import Backing
    from vmm.memory.backings import guest_memfd, memfd

    kinds: list[type[Any]] = [
        guest_memfd.GuestMemfdBacking,
        guest_memfd.PlainGuestMemfdBacking,
        guest_memfd.MappedGuestMemfdBacking,
        guest_memfd.InPlaceGuestMemfdBacking,
        memfd.MemfdBacking,
    ]

    lending = {made.__name__: can_lend(cast(Backing, object.__new__(made))) for made in kinds}

    assert lending == {
        "GuestMemfdBacking": False,
        "PlainGuestMemfdBacking": False,
        "MappedGuestMemfdBacking": True,
        "InPlaceGuestMemfdBacking": False,
        "MemfdBacking": True,
    }
