"""`pyvmm check` on this machine: what it says agrees with what guests then meet."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings.exits import InternalErrorExit
from kvm_bindings.x86_64 import System
from tests.support import command, guests
from tests.support.tiny_guest import TinyGuest
from vmm.arch import architecture
from vmm.arch.x86_64.capabilities import capabilities
from vmm.arch.x86_64.cpuid import is_amd
from vmm.arch.x86_64.probes.hypercall import hypercall_behaviour
from vmm.host.check import check_host

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

FLD1 = b"\xd9\xe8\xe6\x10"  # and out: x87, which KVM's emulator has not


@pytest.fixture(scope="module")
def checked(kvm: System) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of the command; command.run has a time limit."""
    done = command.run("check", "--json")
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def found(checked: tuple[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["key"]: each for each in checked[1]["capabilities"]}


def test_every_capability_is_probed(found: dict[str, dict[str, Any]]) -> None:
    assert list(found) == [each.key for each in capabilities(architecture())]
    assert {key for key, each in found.items() if each["status"] == "unknown"} <= {"memory_faults"}


def test_exit_status_is_that_of_the_main_job(checked: tuple[int, dict[str, Any]]) -> None:
    status, data = checked

    assert status == data["exit_status"]
    assert status == (0 if data["jobs"]["kernel_private"]["can_run"] else 3)


def test_interpreted_kernel_mode_is_said(kvm: System, found: dict[str, dict[str, Any]]) -> None:
    with TinyGuest(kvm, FLD1) as guest:
        if not isinstance(guest.run(), InternalErrorExit):
            pytest.skip("this KVM runs kernel mode on the processor; one that interprets it shows")

    assert found["kernel_mode"]["status"] == "broken"
    assert found["kernel_mode"]["data"] == {"behaviour": "interpreted", "instruction": "paddq"}
    assert found["user_mode"]["status"] == "yes"


def test_interpreted_code_has_to_be_read(found: dict[str, dict[str, Any]]) -> None:
    if found["kernel_mode"]["status"] == "yes":
        pytest.skip("this KVM runs kernel mode on the processor; one that interprets it shows")

    assert found["private_code"]["status"] == "no"
    assert "cpuid" in found["private_code"]["data"]["needs_reading"]


def test_hypercall_that_hangs_is_said_within_two_seconds(
    kvm: System, found: dict[str, dict[str, Any]]
) -> None:
    behaviour = hypercall_behaviour(kvm, amd=is_amd(kvm.supported_cpuid()))
    if behaviour != "hangs":
        pytest.skip(f"a hypercall {behaviour} here; a KVM that never returns from one shows it")

    assert found["hypercall_exits"]["result"] == "never return"
    assert found["hypercall_exits"]["data"]["milliseconds"] < 2000


def test_guest_memfd_kinds_are_told_apart(
    found: dict[str, dict[str, Any]], guest_memfd_flags: int
) -> None:
    strong = found["guest_memfd_mmap"]["data"]
    assert strong["guest_faults"] == "guest_memfd"
    assert (strong["host_load"], strong["host_store"]) == ("EFAULT", "EFAULT")
    assert strong["guest_reads_zeros_after_punch"]
    if guest_memfd_flags & 2:
        weak = found["guest_memfd_mmap_init_shared"]["data"]
        assert weak["guest_faults"] == "guest_memfd"
        assert (weak["host_load"], weak["host_store"]) == ("works", "works")
    assert found["guest_memfd"]["data"]["guest_faults"] == "userspace_addr"


def test_memory_fault_is_provoked_and_answered(
    found: dict[str, dict[str, Any]], guest_memfd_flags: int
) -> None:
    assert found["memory_faults"]["status"] == "yes"
    assert "exited with GPA 0x200000" in found["memory_faults"]["evidence"]


def test_memfds_are_tried_with_a_guest(found: dict[str, dict[str, Any]]) -> None:
    sealed, secret = found["memfd_sealed"], found["memfd_secret"]
    assert sealed["status"] == "yes"
    assert sealed["data"]["truncate"] == "EPERM"
    assert secret["status"] == "no"
    if secret["result"] != "none here":  # KVM can't pin its pages
        assert "KVM_RUN" in secret["evidence"] and "EFAULT" in secret["evidence"]
    assert found["memfd_hugetlb"]["result"] in ("works", "none here")


def test_payload_that_can_run_does_so_with_scheme_and_backing_named(
    checked: tuple[int, dict[str, Any]], tmp_path: Path
) -> None:
    job = checked[1]["jobs"]["payload_private"]
    if not job["can_run"]:
        pytest.skip(f"the payload lacks {job['missing']} here")
    report = tmp_path / "r.json"

    done = command.run("--private-mem", "--mem", "16M", "--report", str(report))

    assert done.returncode == 0
    content = json.loads(report.read_text())
    assert content["backings"]["private"] == job["backing"]
    assert content["scheme"] == job["scheme"]
    assert content["schemes_not_taken"] == job["schemes_not_taken"]


def test_kernel_whose_hypercalls_do_not_work_is_pointed_to_check(
    found: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    if found["hypercall_exits"]["status"] == "yes":
        pytest.skip("hypercalls work here; a KVM that does not pass them on shows it")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(guests.kernel(guests.RESET))

    done = command.run("--kernel", str(kernel), "--private-mem")

    assert done.returncode == 3
    assert done.stderr.endswith(b"; pyvmm check shows what this host can do\n")


def test_terminal_shows_the_verdict_and_is_left_as_it_was(
    checked: tuple[int, dict[str, Any]],
) -> None:
    with command.Session(["check"]) as session:
        session.expect(b"without --private-mem: can")
        session.expect(b"pyvmm check -v")
        assert session.wait() == (checked[0], "")
        assert session.modes() == session.modes_before


def test_check_leaves_no_fd_behind(kvm: System) -> None:
    check_host(architecture())
    before = sorted(os.listdir("/proc/self/fd"))

    check_host(architecture())

    assert sorted(os.listdir("/proc/self/fd")) == before
