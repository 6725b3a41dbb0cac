"""Protected KVM in the lab: a host that truly can't touch what its guest doesn't share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lab.conftest import BOOT_SECONDS, TIME_LIMIT, Starter
from tests.lab.ext4_disk import Ext4Disk
from tests.lab.test_arm64 import FIRST_SECONDS, readme_policy
from tests.lab.test_linux import Shell, report_of

PROTECTED_CASES = 7
"""Those of vmm.selftest.cases.protected."""

# KVM_VM_TYPE_ARM_PROTECTED (uapi/linux/kvm.h) with the default size of addresses, 40 bits.
PROBE = """
from kvm_bindings import System
System().create_vm(1 << 31).close()
print("protected")
"""


@pytest.mark.timeout(FIRST_SECONDS)
def test_pkvm_machine_makes_protected_vms(lab_start: Starter) -> None:
    run = lab_start(["python3", "-c", PROBE], program=True, host="pkvm")

    assert run.wait(BOOT_SECONDS) == 0, bytes(run.stderr.data)
    assert bytes(run.stdout.data).split() == [b"protected"]


@pytest.mark.timeout(FIRST_SECONDS)
def test_protected_guest_boots_to_a_shell_and_its_disk_holds_what_it_wrote(
    lab_start: Starter, tmp_path: Path
) -> None:
    disk = Ext4Disk(tmp_path)

    words = ["--private-mem", "--append", "quiet", "--mem", "256M"]
    run = lab_start([*words, "--disk", disk.path.name, "--report", "report.json"], host="pkvm")
    shell = Shell(run)
    assert "Memory encryption is active" in shell.type("dmesg | grep 'software IO TLB'")
    disk.use(shell)
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    disk.check()
    report = report_of(tmp_path)
    assert (report["scheme"], report["states"]) == ("pkvm", "observed, not told")
    assert report["isolation"].startswith("kernel-enforced (pKVM)")
    observed = report["pages"]["observed"]
    # Private pages were refused by the kernel, and everything that the disk needed was reached.
    assert observed["private"] > 0 and observed["reached"] > 0
    assert report["io"]["blk0"]["refused"] == report["io"]["blk0"]["errors"] == 0


@pytest.mark.timeout(FIRST_SECONDS)
def test_policy_that_could_never_be_asked_is_refused_with_what_would_work(
    lab_start: Starter, tmp_path: Path
) -> None:
    words = ["--kernel", "payload", "--private-mem", "--policy", readme_policy(tmp_path)]
    run = lab_start([*words, "--scheme", "pkvm"], host="pkvm")

    assert run.wait(BOOT_SECONDS) == 2
    complaint = bytes(run.stderr.data).decode()
    assert complaint.count("\n") == 1
    assert "on_share" in complaint and "--scheme realm" in complaint


@pytest.mark.timeout(FIRST_SECONDS)
def test_host_finds_no_byte_of_private_pages_and_all_of_shared_ones(lab_start: Starter) -> None:
    run = lab_start(["selftest", "--only", "pkvm/memfd-protected"], host="pkvm")

    status = run.wait(TIME_LIMIT)
    said = bytes(run.stdout.data).decode()
    assert status == 0, said[-3000:]
    counts = re.search(r"(\d+) passed, 0 failed, (\d+) skipped", said)
    assert counts is not None and int(counts[1]) >= PROTECTED_CASES, said[-3000:]


# Ends pyvmm by SIGKILL at various moments of a protected guest's life, amid its shares too. Then
# the host has nothing to complain of, and runs the next guest to its end.
KILLING = """
import re, subprocess, sys

def pyvmm():
    words = ["--private-mem", "--scheme", "pkvm", "--mem", "16M"]
    return subprocess.Popen([sys.executable, "-m", "vmm", *words],
                            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)

for moment in (b"ok 1 ", b"ok 6 ", b"ok 11 ", b"ok 16 "):
    run = pyvmm()
    if not any(moment in line for line in run.stdout):
        sys.exit(f"no line has {moment}")
    run.kill()
    run.wait()
last = pyvmm()
print(last.stdout.read().decode()[-60:])
kernel = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
bad = [line for line in kernel.splitlines() if re.search("BUG|Oops|WARNING|Call trace", line)]
print("complaints:", bad)
sys.exit(last.wait())
"""


@pytest.mark.timeout(FIRST_SECONDS)
def test_host_survives_that_pyvmm_is_killed_amid_its_guests_checks(lab_start: Starter) -> None:
    run = lab_start(["python3", "-c", KILLING], program=True, host="pkvm")

    status = run.wait(TIME_LIMIT)
    said = bytes(run.stdout.data).decode()
    assert status == 0, (said, bytes(run.stderr.data))
    assert re.search(r"payload: all \d+ checks passed", said)
    assert "complaints: []" in said
