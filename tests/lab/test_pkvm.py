"""Protected KVM in the lab: a host that truly can't touch what its guest doesn't share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.conftest import BOOT_SECONDS, Starter
from tests.lab.ext4_disk import Ext4Disk
from tests.lab.test_arm64 import FIRST_SECONDS
from tests.lab.test_linux import Shell, report_of

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
