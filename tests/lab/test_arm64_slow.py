"""arm64 guests that take minutes, or that only sometimes are worth a machine: when asked for.

A stock kernel is eight times as large as the lab's small one, and is a minute and more on its way
to its shell under two layers of emulation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.lab.conftest import BOOT_SECONDS, Starter
from tests.lab.ext4_disk import Ext4Disk
from tests.lab.slow import slow
from tests.lab.test_arm64 import FIRST_SECONDS
from tests.lab.test_linux import Shell, report_of

STOCK = "debian:7.3"
STOCK_SECONDS = 300.0

pytestmark = [pytest.mark.timeout(FIRST_SECONDS), slow]

REPORT = ("--report", "report.json")


def linux(kernel: str, *more: str, words: str = "quiet") -> list[str]:
    return ["--kernel", kernel, "--append", words, "--mem", "256M", *more, *REPORT]


# Without private memory, and under the schemes that need no pKVM.
PAYLOAD_SCHEMES = {"": "none", "--private-mem": "realm", "--private-mem --scheme remap": "remap"}
_PAYLOADS = "uname -m\n" + "".join(
    f"pyvmm {options} --disk $PYVMM_LAB_DISKS --report /tmp/report </dev/null || exit\n"
    "tr -d '\\n' </tmp/report; echo; echo end\n"
    for options in PAYLOAD_SCHEMES
)


def test_arm64_machine_runs_the_payload_under_each_scheme(
    lab_start: Starter, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    before = disk.read_bytes()

    run = lab_start(["sh", "-c", _PAYLOADS], program=True, host="arm64", disks=["disk.img"])

    assert run.wait(3 * BOOT_SECONDS) == 0, (bytes(run.stdout.data), bytes(run.stderr.data))
    machine, said = bytes(run.stdout.data).decode().split("\n", 1)
    assert machine == "aarch64"
    runs = said.split("\nend\n")[:-1]
    for text, (options, scheme) in zip(runs, PAYLOAD_SCHEMES.items(), strict=True):
        assert "disk-write" in text and "checks passed" in text and "not ok" not in text, text
        report = json.loads(text.splitlines()[-1])
        assert report["scheme"] == scheme, options
        assert report["io"]["blk0"]["errors"] == 0
    assert disk.read_bytes() == before  # it puts back what it wrote over


def test_stock_kernel_runs_protected_and_shares_nothing(lab_start: Starter, tmp_path: Path) -> None:
    run = lab_start(linux(STOCK, "--private-mem"), host="pkvm")
    shell = Shell(run)
    encrypted = shell.type("dmesg | grep -c 'Memory encryption is active'")
    release = shell.type("uname -r")
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    assert encrypted == "0" and release.startswith(STOCK.removeprefix("debian:"))
    report = report_of(tmp_path)
    assert (report["scheme"], report["states"]) == ("pkvm", "observed, not told")
    # It has touched some 100 MiB, and no page of that is the host's to see.
    assert report["pages"]["observed"]["private"] > 0


def test_stock_kernel_with_a_disk_is_told_of_at_once_as_it_waits_for_ever(
    lab_start: Starter, tmp_path: Path
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    words = linux(STOCK, "--private-mem", "--disk", "disk.img")
    run = lab_start(words, host="pkvm", terminal=(24, 200))

    run.expect(b"blk0 stopped, the guest hasn't shared what it was to use", STOCK_SECONDS)
    run.expect(b"CONFIG_ARM_PKVM_GUEST", STOCK_SECONDS)
    run.send(b"\x01x")

    assert run.wait(STOCK_SECONDS) == 0
    report = report_of(tmp_path)
    assert report["guest"]["exit"] == "quit"
    assert report["io"]["blk0"]["refused"] == 1


def test_stock_kernel_with_two_cpus_takes_itself_for_a_realm(
    lab_start: Starter, tmp_path: Path
) -> None:
    disk = Ext4Disk(tmp_path)
    options = ["--private-mem", "--cpus", "2", "--disk", disk.path.name]
    run = lab_start(linux(STOCK, *options), host="arm64")
    shell = Shell(run)
    assert shell.type("nproc") == "2"
    disk.use(shell)
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    disk.check()
    report = report_of(tmp_path)
    assert (report["scheme"], report["states"]) == ("realm", "told")
    shares = report["conversions"]["share"]
    assert shares["calls"] > 0 and shares["denied"] == shares["failed"] == 0
    assert report["io"]["blk0"]["refused"] == report["io"]["blk0"]["errors"] == 0


_NOTHING = """
from vmm.policy import Deny, Policy

class Nothing(Policy):
    def on_share(self, event, view):
        return Deny()
"""


def test_realm_that_is_refused_every_share_runs_on_without_its_disk(
    lab_start: Starter, tmp_path: Path
) -> None:
    (tmp_path / "nothing.py").write_text(_NOTHING)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    options = ["--private-mem", "--policy", "nothing.py:Nothing", "--disk", "disk.img"]
    run = lab_start(linux("pkvm-guest", *options), host="arm64")
    shell = Shell(run)
    disks = shell.type("ls /dev/vda")
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    assert "No such file" in disks
    report = report_of(tmp_path)
    assert report["conversions"]["share"]["denied"] > 0
    assert report["pages"]["shared_bytes"] == 0
    assert report["io"]["blk0"]["requests"] == 0


@pytest.mark.parametrize("private", [[], ["--private-mem"]], ids=["ordinary", "realm"])
def test_disk_works_by_level_interrupts_where_messages_are_off(
    private: list[str], lab_start: Starter, tmp_path: Path
) -> None:
    disk = Ext4Disk(tmp_path)
    options = [*private, "--disk", disk.path.name]
    run = lab_start(linux("pkvm-guest", *options, words="quiet pci=nomsi"), host="arm64")
    shell = Shell(run)
    lines = shell.type("grep virtio /proc/interrupts").splitlines()
    disk.use(shell)
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    disk.check()
    assert len(lines) == 1 and "Level" in lines[0], lines
    assert int(lines[0].split()[1]) > 0
    assert report_of(tmp_path)["io"]["blk0"]["errors"] == 0
