"""An arm64 lab machine: its KVM, the extension for it, and an ordinary Linux guest with a disk.

The guest's kernel is the lab's small one: Debian's stock kernel, eight times as large, takes a
minute and a half to its shell under two layers of emulation. PYVMM_LAB_SLOW=1 boots that as well.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.markdown import README, blocks
from tests.lab.conftest import BOOT_SECONDS, Starter
from tests.lab.ext4_disk import Ext4Disk
from tests.lab.slow import slow
from tests.lab.test_linux import Shell, report_of

# The first arm64 test of a machine downloads and compiles: Python, the extension, a kernel.
FIRST_SECONDS = 2400
PROBE = """
import os
from kvm_bindings import System
print(os.uname().machine, System().api_version())
"""


@pytest.mark.timeout(FIRST_SECONDS)
def test_arm64_machine_has_kvm_and_the_extension_for_it(lab_start: Starter) -> None:
    run = lab_start(["python3", "-c", PROBE], program=True, host="arm64")

    assert run.wait(BOOT_SECONDS) == 0, bytes(run.stderr.data)
    assert bytes(run.stdout.data).split() == [b"aarch64", b"12"]


@pytest.mark.timeout(FIRST_SECONDS)
@pytest.mark.parametrize(
    "kernel",
    [
        "pkvm-guest",
        pytest.param("debian:7.3", marks=slow),
    ],
)
def test_arm64_guest_boots_to_a_shell_and_its_disk_holds_what_it_wrote(
    kernel: str, lab_start: Starter, tmp_path: Path
) -> None:
    disk = Ext4Disk(tmp_path)

    words = ["--kernel", kernel, "--append", "quiet", "--cpus", "2", "--mem", "256M"]
    run = lab_start([*words, "--disk", disk.path.name, "--report", "report.json"], host="arm64")
    shell = Shell(run)
    assert shell.type("uname -m; nproc") == "aarch64\n2"
    disk.use(shell)
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    disk.check()
    report = report_of(tmp_path)
    assert report["guest"]["exit"] == "poweroff"
    assert report["scheme"] == "none"


def readme_policy(folder: Path) -> str:
    """README's first policy, as it stands there, in a file; what --policy takes."""
    (block,) = (each for each in blocks(README) if each.file == "frugal.py")
    (folder / "frugal.py").write_text(block.text)
    return "frugal.py:Frugal"


@pytest.mark.timeout(FIRST_SECONDS)
def test_policy_of_the_readme_is_asked_by_a_guest_that_takes_itself_for_a_realm(
    lab_start: Starter, tmp_path: Path
) -> None:
    disk = Ext4Disk(tmp_path)

    words = ["--kernel", "pkvm-guest", "--private-mem", "--append", "quiet", "--mem", "256M"]
    words += ["--policy", readme_policy(tmp_path), "--disk", disk.path.name]
    run = lab_start([*words, "--report", "report.json"], host="arm64")
    shell = Shell(run)
    disk.use(shell)
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    disk.check()
    report = report_of(tmp_path)
    assert (report["scheme"], report["doorbell"], report["states"]) == ("realm", "rsi", "told")
    assert report["isolation"].startswith("policy-enforced rehearsal")
    shares = report["conversions"]["share"]
    assert shares["calls"] > 0 and shares["denied"] == shares["failed"] == 0
    assert 0 < report["pages"]["shared_bytes"] == shares["bytes"] < 80 << 20
    assert report["io"]["blk0"]["refused"] == 0
