"""The whole command with the embedded payload, on every backing that this host has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvm_bindings import KvmError, ioctls
from kvm_bindings.x86_64 import System
from kvm_bindings.x86_64 import ioctls as x86

pytestmark = pytest.mark.kvm

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
SECONDS = 60
BACKINGS = ("auto", "guest_memfd", "guest_memfd-mmap", "memfd")
NEEDED_FLAGS = {
    "guest_memfd": ioctls.GUEST_MEMFD_FLAG_MMAP,
    "guest_memfd-mmap": ioctls.GUEST_MEMFD_FLAG_MMAP | ioctls.GUEST_MEMFD_FLAG_INIT_SHARED,
}


@dataclass
class Run:
    """How one command ended."""

    status: int
    output: str
    errors: str
    report: dict[str, Any]


def pyvmm(report: Path, *options: str, **environment: str) -> Run:
    """`pyvmm OPTIONS --report ...` in a process of its own, under a time limit."""
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "--report", str(report), *options],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    content = report.read_text() if report.exists() else ""
    return Run(done.returncode, done.stdout, done.stderr, json.loads(content) if content else {})


@pytest.fixture
def report(kvm: System, tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def require_backing(kvm: System, name: str) -> None:
    with kvm.create_vm() as vm:
        flags = vm.check_extension(ioctls.KVM_CAP_GUEST_MEMFD_FLAGS)
    needed = NEEDED_FLAGS.get(name, 0)
    if flags & needed != needed:
        pytest.skip(f"KVM_CAP_GUEST_MEMFD_FLAGS = {flags:#x} lacks {needed:#x}, for {name}")


def assert_books_balance(report: dict[str, Any], ram: int) -> None:
    conversions, pages = report["conversions"], report["pages"]
    share, unshare = conversions["share"], conversions["unshare"]
    private_at_start = ram - 2 * MIB  # the payload's own 2 MiB start shared
    assert pages["ram_bytes"] == ram == pages["private_bytes"] + pages["shared_bytes"]
    assert pages["private_bytes"] == private_at_start - share["bytes"] + unshare["bytes"]
    assert 0 < report["residency"]["private_bytes"] <= pages["private_bytes"]
    assert 0 < report["residency"]["shared_bytes"] <= pages["shared_bytes"]
    for tally in (share, unshare):
        assert tally["bytes"] % 4096 == 0
        assert tally["denied"] + tally["failed"] < tally["calls"]


@pytest.mark.parametrize("backing", BACKINGS)
def test_payload_passes_and_the_report_adds_up(kvm: System, report: Path, backing: str) -> None:
    require_backing(kvm, backing)

    run = pyvmm(report, f"--private-mem={backing}", "--mem", "64M")

    assert (run.status, run.errors) == (0, "")
    assert re.search(r"^payload: all \d+ checks passed\r?$", run.output, re.MULTILINE)
    assert "not ok" not in run.output
    content = run.report
    assert content["guest"] == {"exit": "poweroff", "reason": ""}
    assert (content["scheme"], content["doorbell"]) == ("cbit", "port")
    assert content["backings"]["shared"] == "memfd"
    if backing != "auto":
        assert content["backings"]["private"] == backing
    strong = content["backings"]["private"] == "guest_memfd"
    word = "kernel-enforced" if strong else "policy-enforced rehearsal"
    assert content["isolation"].startswith(word)
    assert_books_balance(content, 64 * MIB)
    assert content["conversions"]["share"]["calls"] >= 5
    assert content["conversions"]["share"]["failed"] > 0, "the payload makes bad requests, too"


@pytest.mark.parametrize("backing", ["guest_memfd", "guest_memfd-mmap", "memfd", "memfd-sealed"])
def test_payload_passes_with_one_address_for_both_sides(
    kvm: System, report: Path, disk: Path, backing: str
) -> None:
    """Memslots are replaced under it: it finds every word, and no access becomes MMIO."""
    require_backing(kvm, backing)
    options = ("--scheme", "remap", f"--private-mem={backing}", "--mem", "64M")

    run = pyvmm(report, *options, "--disk", str(disk))

    assert (run.status, run.errors) == (0, "")
    assert "C-bit mask 0x0" in run.output
    assert "not ok" not in run.output
    content = run.report
    assert (content["scheme"], content["schemes_not_taken"]) == ("remap", {})
    assert content["backings"]["private"] == backing
    assert "mmio" not in content["exits"]
    assert_books_balance(content, 64 * MIB)


def test_default_scheme_says_why_a_stronger_one_is_not_taken(report: Path) -> None:
    content = pyvmm(report, "--private-mem", "--mem", "16M").report

    stronger = ["attributes", "in-place", "cbit", "remap"]
    assert list(content["schemes_not_taken"]) == stronger[: stronger.index(content["scheme"])]
    assert all(content["schemes_not_taken"].values())


@pytest.mark.parametrize("scheme", ["attributes", "in-place"])
def test_scheme_that_this_host_lacks_ends_with_3_and_names_what_is_there(
    kvm: System, report: Path, scheme: str
) -> None:
    with suppress(KvmError), kvm.create_vm(x86.KVM_X86_SW_PROTECTED_VM):
        pytest.skip("this host makes VMs of the type that the scheme needs")

    run = pyvmm(report, "--private-mem", "--scheme", scheme)

    assert run.status == 3
    assert re.fullmatch(
        rf"pyvmm: --scheme {scheme} --private-mem=auto: not on this host \({scheme}: "
        r"KVM_CREATE_VM.*\); what works here: cbit with .*memfd.*; remap with .*memfd.*\n",
        run.errors,
    )


def test_report_has_every_promised_key(report: Path) -> None:
    content = pyvmm(report, "--private-mem", "--mem", "16M").report

    assert content.keys() >= {
        "scheme", "doorbell", "backings", "isolation", "guest", "conversions", "residency", "io",
        "exits", "wall_s",
    }  # fmt: skip
    assert content["backings"].keys() >= {"private", "shared"}
    assert content["guest"].keys() >= {"exit", "reason"}
    for direction in ("share", "unshare"):
        tally = content["conversions"][direction]
        assert tally.keys() >= {"calls", "bytes", "denied", "failed"}
    assert content["residency"].keys() >= {"private_bytes", "shared_bytes"}
    assert content["exits"]["io"] > 0
    assert content["wall_s"] > 0


def test_ordinary_vm_runs_the_payload_with_everything_shared(report: Path) -> None:
    run = pyvmm(report, "--mem", "64M")

    assert run.status == 0
    assert "skip conversions" in run.output
    content = run.report
    assert (content["scheme"], content["doorbell"]) == ("none", None)
    assert content["backings"] == {"private": None, "shared": "memfd"}
    assert content["isolation"].startswith("none")
    assert content["conversions"]["share"]["calls"] == 0
    assert content["pages"]["shared_bytes"] == 64 * MIB
    assert content["residency"]["private_bytes"] == 0


def test_payload_on_both_sides_of_the_hole_reaches_all_memory(report: Path) -> None:
    """RAM above 4 GiB has memslots of its own; the sparse files cost only what is touched."""
    run = pyvmm(report, "--private-mem=memfd", "--mem", "3200M")

    assert run.status == 0
    assert_books_balance(run.report, 3200 * MIB)


# Disks.


def fnv_1a(data: bytes) -> int:
    value = 0xCBF2_9CE4_8422_2325
    for byte in data:
        value = (value ^ byte) * 0x100_0000_01B3 & (1 << 64) - 1
    return value


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(300 * 512))
    return path


@pytest.mark.parametrize("engine", ["pread", "hva"])
@pytest.mark.parametrize("private", [("--private-mem",), ()], ids=["private", "ordinary"])
def test_guest_reads_what_is_on_the_disk(
    report: Path, disk: Path, private: tuple[str, ...], engine: str
) -> None:
    before = disk.read_bytes()

    run = pyvmm(report, *private, "--mem", "64M", "--disk", f"{disk},io={engine}")

    assert (run.status, run.errors) == (0, "")
    assert "virtio-blk at PCI 0:1.0" in run.output
    assert "300 sectors" in run.output
    assert f"sectors 0..7, FNV-1a {fnv_1a(before[:4096]):#x}" in run.output
    assert f"first 65536 bytes, FNV-1a {fnv_1a(before[:65536]):#x}" in run.output
    io = run.report["io"]["blk0"]
    assert io["bytes_read"] >= 4096 + 65536
    assert io["bytes_written"] >= 512
    assert io["errors"] == io["refused"] == 0
    moved = {way: size for way, size in io["engine"]["bytes"].items() if size}
    way = {"pread": "buffer"}.get(engine, engine)
    assert moved == {way: io["bytes_read"] + io["bytes_written"]}
    assert disk.read_bytes()[:-512] == before[:-512], "only the last sector is written"


def test_read_only_disk_is_read_and_stays_as_it_is(report: Path, disk: Path) -> None:
    before = disk.read_bytes()

    run = pyvmm(report, "--private-mem", "--mem", "64M", "--disk", f"{disk},ro")

    assert run.status == 0
    assert f"FNV-1a {fnv_1a(before[:4096]):#x}" in run.output
    assert run.report["io"]["blk0"]["bytes_written"] == 0
    assert disk.read_bytes() == before


# Policies.


def policy_file(tmp_path: Path, body: str) -> str:
    path = tmp_path / "policy.py"
    path.write_text(f"from vmm.policy import *\n\nclass Mine(Policy):\n{body}\n")
    return f"{path}:Mine"


def test_policy_that_denies_everything_fails_the_payload(report: Path, tmp_path: Path) -> None:
    policy = policy_file(
        tmp_path,
        "    def on_share(self, event, view):\n        return Deny()\n    on_unshare = on_share",
    )

    run = pyvmm(report, "--private-mem", "--mem", "64M", "--policy", policy)

    assert run.status == 1
    assert re.search(r"^not ok \d+ share", run.output, re.MULTILINE)
    assert re.fullmatch(r"pyvmm: the guest failed: .*\n", run.errors)
    content = run.report
    assert content["guest"]["exit"] == "failed"
    share = content["conversions"]["share"]
    assert share["denied"] == share["calls"] > 0
    assert share["bytes"] == 0
    assert content["pages"]["private_bytes"] == 62 * MIB, "nothing was converted"


def test_policy_that_breaks_ends_the_run_with_its_own_traceback(
    report: Path, tmp_path: Path
) -> None:
    policy = policy_file(
        tmp_path, "    def on_share(self, event, view):\n        return open('/no/such/file')"
    )

    run = pyvmm(report, "--private-mem", "--mem", "64M", "--policy", policy)

    assert run.status == 1
    assert 'policy.py", line 5, in on_share' in run.errors
    assert re.fullmatch(
        r"pyvmm: policy Mine: on_share for \[0x\w+, 0x\w+\) raised FileNotFoundError.*",
        run.errors.splitlines()[-1],
    )


BUILTIN = "vmm.policy.builtin"


def test_quota_refuses_what_exceeds_it_in_a_real_run(report: Path) -> None:
    policy = ("--policy", f"{BUILTIN}:Quota", "--policy-arg", "limit=4M")

    run = pyvmm(report, "--private-mem", "--mem", "64M", *policy)

    # 2 MiB start shared, 4 KiB more are fine, 2 MiB more are not.
    assert run.status == 1
    assert "ok 5 share-4KiB" in run.output
    assert re.search(r"^not ok 6 share-2MiB: .* saw -13", run.output, re.MULTILINE)
    share = run.report["conversions"]["share"]
    assert (share["calls"], share["bytes"], share["denied"]) == (2, 4096, 1)


def test_coalescing_is_not_noticed_by_the_payload(report: Path) -> None:
    """Pages whose discard is put off still come back as zeros, and are accounted for."""
    policy = ("--policy", f"{BUILTIN}:Coalesce", "--policy-arg", "seconds=1000")

    run = pyvmm(report, "--private-mem", "--mem", "64M", *policy)

    assert (run.status, run.errors) == (0, "")
    assert "ok 14 reshare: nothing old came back" in run.output
    content = run.report
    assert content["refinements"]["reclaimed_bytes"] > 0
    pages, conversions = content["pages"], content["conversions"]
    assert pages["deferred_bytes"] > 0
    assert (
        pages["private_bytes"] + pages["deferred_bytes"]
        == 62 * MIB - conversions["share"]["bytes"] + conversions["unshare"]["bytes"]
    )


def test_kept_pages_come_back_with_their_content_which_the_payload_notices(report: Path) -> None:
    """What the documentation warns of: the guest has to initialise what it shares."""
    policy = ("--policy", f"{BUILTIN}:KeepShared")

    run = pyvmm(report, "--private-mem", "--mem", "64M", *policy)

    assert run.status == 1
    assert re.search(r"^not ok 14 reshare: freshly shared memory: ", run.output, re.MULTILINE)


def test_several_policies_must_all_allow_and_audit_writes_it_down(
    report: Path, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    options = (
        "--policy", f"{BUILTIN}:AllowAll",
        "--policy", f"{BUILTIN}:Audit", "--policy-arg", f"file={log}",
        "--policy-arg", f"of={BUILTIN}:RateLimit", "--policy-arg", "of.per_second=0.001",
    )  # fmt: skip

    run = pyvmm(report, "--private-mem", "--mem", "64M", *options)

    assert run.status == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line.get("decision") for line in lines] == ["Allow()", "Deny(errno=16)", None]
    assert lines[-1]["exit"] == run.report["guest"]["exit"] == "failed"


@pytest.mark.parametrize("hook", ["on_share(self, event, view)", "on_boot(self, view)"])
def test_kill_ends_the_run_with_status_1_and_the_reason(
    report: Path, tmp_path: Path, hook: str
) -> None:
    policy = policy_file(tmp_path, f"    def {hook}:\n        return Kill('seen enough')")

    run = pyvmm(report, "--private-mem", "--mem", "64M", "--policy", policy)

    assert run.status == 1
    assert run.errors == "pyvmm: the run was ended: policy Mine: seen enough\n"
    assert run.report["guest"] == {"exit": "killed", "reason": "policy Mine: seen enough"}
    assert run.report["conversions"]["share"]["bytes"] == 0
    assert "ok 5" not in run.output, "the guest ran no further"


def test_due_discards_are_made_while_the_guest_runs(report: Path, tmp_path: Path) -> None:
    """By the device loop, without another request of the guest's."""
    policy = policy_file(
        tmp_path,
        "    def on_unshare(self, event, view):\n        return Defer(view.now)",
    )

    run = pyvmm(report, "--private-mem", "--mem", "64M", "--policy", policy)

    assert run.status == 0
    refinements = run.report["refinements"]
    assert refinements["reclaimed_bytes"] < refinements["deferred_bytes"]
    assert run.report["pages"]["deferred_bytes"] < refinements["deferred_bytes"]


# How strong the isolation is: another process maps the guest's private memory.

PROBE_POLICY = '''
import json, os, subprocess, sys
from vmm.policy import Allow, Policy

READ = """
import mmap, sys
fd, offset = int(sys.argv[1]), int(sys.argv[2])
view = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset)
print("mapped", flush=True)
print(view[:4096].hex(), flush=True)
"""


class Prober(Policy):
    """At the first share, when the guest has written its private memory, a child looks at it."""

    def on_share(self, event, view):
        if not hasattr(self, "results"):
            fd = view.memory.private.fd
            self.results = [self.read(fd, page) for page in (0x200000, 0x234000, 0xABC000)]
            with open(os.environ["PROBE_RESULTS"], "w") as file:
                json.dump(self.results, file)
        return Allow()

    def read(self, fd, offset):
        child = subprocess.run(
            [sys.executable, "-c", READ, str(fd), str(offset)],
            pass_fds=(fd,), capture_output=True, text=True, timeout=30,
        )
        return [offset, child.returncode, child.stdout.split(), child.stderr]
'''


def guest_page(gpa: int) -> str:
    """What the payload has written to a private page, as hexadecimal digits."""
    words = ((gpa + offset) ^ 0x7072_6976_6174_6531 for offset in range(0, 4096, 8))
    return b"".join(word.to_bytes(8, "little") for word in words).hex()


def probe(report: Path, tmp_path: Path, backing: str) -> list[list[Any]]:
    """Reads of the guest's pages by a child process: (gpa, exit code, words printed, errors)."""
    policy, results = tmp_path / "prober.py", tmp_path / "results.json"
    policy.write_text(PROBE_POLICY)
    run = pyvmm(
        report, f"--private-mem={backing}", "--mem", "64M", "--policy", f"{policy}:Prober",
        "--sandbox=off",  # it forks, and writes a file
        PROBE_RESULTS=str(results),
    )  # fmt: skip
    # The guest finds all of its words intact after that, and the host holds pages for them.
    assert (run.status, run.errors) == (0, "")
    assert run.report["residency"]["private_bytes"] >= 14 * MIB
    found: list[list[Any]] = json.loads(results.read_text())
    assert len(found) == 3
    return found


def test_process_that_reads_a_private_page_of_a_guest_memfd_dies_of_sigbus(
    kvm: System, report: Path, tmp_path: Path
) -> None:
    require_backing(kvm, "guest_memfd")

    for _gpa, code, printed, errors in probe(report, tmp_path, "guest_memfd"):
        assert (code, printed, errors) == (-signal.SIGBUS, ["mapped"], "")


@pytest.mark.parametrize("backing", ["guest_memfd-mmap", "memfd"])
def test_process_that_reads_a_private_page_of_a_rehearsal_sees_the_guests_bytes(
    kvm: System, report: Path, tmp_path: Path, backing: str
) -> None:
    """The counter-proof: the same reads succeed where the report says that they would."""
    require_backing(kvm, backing)

    for gpa, code, printed, errors in probe(report, tmp_path, backing):
        assert (code, errors) == (0, "")
        assert printed == ["mapped", guest_page(gpa)]
