"""A stock kernel in private memory whose disk is behind a virtual IOMMU: no bounce buffer."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

from tests.lab.conftest import Starter
from tests.lab.test_linux import MIB, REPORT, Shell, ext4_image, linux, report_of
from vmm.devices.virtio.iommu import QUEUE_SIZE


def bounce_slots(shell: Shell) -> int:
    """How many slots of the bounce buffer have been in use at the same time, so far."""
    return int(shell.type("cat /sys/kernel/debug/swiotlb/io_tlb_used_hiwater"))


def test_stock_kernel_lends_its_disks_pages_and_bounces_nothing(
    lab_start: Starter, tmp_path: Path
) -> None:
    content = os.urandom(3 * MIB + 4321)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "from-host").write_bytes(content)
    disk = tmp_path / "disk.ext4"
    ext4_image(disk, tmp_path / "root")

    run = lab_start([*linux(), "--private-mem", "--iommu", "--disk", "disk.ext4", *REPORT])
    shell = Shell(run)
    assert "AMD SEV" in shell.type("dmesg | grep 'Memory Encryption'")
    shell.type("mount -t debugfs none /sys/kernel/debug")
    groups = shell.type("for d in /sys/kernel/iommu_groups/*/devices/*; do basename $d; done")
    before = bounce_slots(shell)
    shell.type("mount -t ext4 /dev/vda /mnt")
    read = shell.type("sha256sum /mnt/from-host")
    shell.type("dd if=/dev/urandom of=/mnt/from-guest bs=4096 count=700 2>/dev/null; sync")
    shell.type("echo 3 >/proc/sys/vm/drop_caches")
    written = shell.type("sha256sum /mnt/from-guest")
    after = bounce_slots(shell)
    faults = shell.type("dmesg | grep -ic 'fault from'")
    shell.type("umount /mnt")
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    assert groups.split() == ["0000:00:01.0"]
    assert read.split()[0] == hashlib.sha256(content).hexdigest()
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, timeout=60, capture_output=True)
    copy = tmp_path / "copy"
    dump = ["debugfs", "-R", f"dump from-guest {copy}", str(disk)]
    subprocess.run(dump, check=True, timeout=60, capture_output=True)
    assert written.split()[0] == hashlib.sha256(copy.read_bytes()).hexdigest()
    report = report_of(tmp_path)
    assert (report["scheme"], faults) == ("cbit", "0")
    assert report["io"]["blk0"]["refused"] == report["io"]["blk0"]["errors"] == 0
    # The IOMMU's own driver bounces its requests, two slots each, as many as its queue takes.
    assert after - before <= 2 * QUEUE_SIZE
    # The disk's bytes have come from and gone to private memory, all of them.
    disk_io = report["io"]["blk0"]
    assert sum(disk_io["engine"]["bytes"].values()) == 0
    moved = sum(disk_io["engine_lent"]["bytes"].values())
    assert moved == disk_io["bytes_read"] + disk_io["bytes_written"] > len(content) + 700 * 4096
    lending = report["iommu"]
    assert lending["lends"] and lending["failed"] == lending["denied"] == 0
    assert lending["lent_bytes_total"] > len(content) + 700 * 4096
    assert 0 < lending["peak_lent_bytes"] < 64 * MIB
    assert not re.search("iommu.*unable", bytes(run.stderr.data).decode(errors="replace"))
