"""Stock kernels in private memory whose devices are behind a virtual IOMMU: no bounce buffer."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.lab.conftest import Starter
from tests.lab.slow import slow
from tests.lab.test_devices import SEED, sha256
from tests.lab.test_linux import MIB, Shell, ext4_image, report_of
from tests.support import vsock_program
from tests.support.lab_peers import BLOB_BYTES, blob
from vmm.devices.virtio.iommu import QUEUE_SIZE
from vmm.lab.interpreter import executable
from vmm.lab.machine import Lab
from vmm.trace.reader import Trace
from vmm.trace.summary import summarise

KERNELS = [
    "debian:6.12",
    pytest.param("debian:7.2", marks=slow),
]
BEHIND = ("blk0", "blk1", "net0", "vsock", "console", "rng")
BOUNCE_BUFFER = 64 * MIB


def start(
    lab: Lab, lab_start: Starter, folder: Path, kernel_name: str, options: list[str]
) -> Shell:
    """A guest with programs on the host that its devices lead to."""
    kernel = lab.guest_kernel(kernel_name)
    outputs = [folder / "peers.json", folder / "report.json", folder / "t"]
    words = [str(executable()), "-m", "tests.support.lab_peers", str(outputs[0]), str(SEED)]
    words += ["--kernel", str(kernel.image), "--initrd", str(lab.guest_initramfs(kernel))]
    words += ["--append", "quiet", "--report", str(outputs[1]), "--trace", str(outputs[2])]
    return Shell(
        lab_start(
            [*words, *options],
            program=True,
            disks=["disk0.ext4", "disk1.ext4"],
            outputs=outputs,
        )
    )


def bounce_slots(shell: Shell) -> int:
    """How many slots of the bounce buffer have been in use at the same time, so far."""
    return int(shell.type("cat /sys/kernel/debug/swiotlb/io_tlb_used_hiwater"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_stock_kernel_lends_pages_to_every_device_and_bounces_nothing(
    kernel: str, lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    content = os.urandom(MIB // 2 + 4321)
    for number in range(2):
        folder = tmp_path / f"root{number}"
        folder.mkdir()
        (folder / "file").write_bytes(content)
        vsock_program.build(folder / "vs")
        ext4_image(tmp_path / f"disk{number}.ext4", folder)
    # The balloon's driver names physical pages: it is there, and not behind the IOMMU.
    options = [
        "--private-mem", "--iommu", "--disk", "/dev/vde", "--disk", "/dev/vdf,queues=2",
        "--net", "tap=tap0,mac=02:00:00:00:00:02", "--vsock", "path=/tmp/v,cid=7",
        "--console", "socket=/tmp/c", "--console", "socket=/tmp/p,name=test.port", "--rng",
        "--balloon", "size=0",
    ]  # fmt: skip

    shell = start(lab, lab_start, tmp_path, kernel, options)
    assert kernel.removeprefix("debian:") in shell.type("uname -r")
    assert "AMD SEV" in shell.type("dmesg | grep 'Memory Encryption'")
    shell.type("mount -t debugfs none /sys/kernel/debug")
    groups = shell.type("ls -d /sys/kernel/iommu_groups/*/devices/* | wc -l")
    before = bounce_slots(shell)
    shell.type("mount -t ext4 /dev/vda /mnt; mkdir /two; mount -t ext4 /dev/vdb /two")
    shell.type("ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up")
    said = {
        "disk given": shell.type("sha256sum /two/file"),
        "net taken": shell.type("nc 192.0.2.1 5000 </mnt/file"),
        "net given": shell.type("nc 192.0.2.1 5001 </dev/null | sha256sum"),
        "vsock taken": shell.type("/mnt/vs connect 5000 </mnt/file"),
        "vsock given": shell.type("/mnt/vs connect 5001 </dev/null | sha256sum"),
    }
    name = shell.type("grep -l test.port /sys/class/virtio-ports/*/name | cut -d/ -f5")
    said["port given"] = shell.type(f"head -c {BLOB_BYTES} /dev/{name} | sha256sum")
    shell.type(f"cat /mnt/file >/dev/{name}")
    shell.type("echo hello from hvc0 >/dev/hvc0")
    random = shell.type("head -c 4096 /dev/hwrng | wc -c")
    shell.type("dd if=/dev/urandom of=/mnt/copy bs=4096 count=200 2>/dev/null; cp /mnt/copy /two")
    shell.type("sync; echo 3 >/proc/sys/vm/drop_caches")
    written = shell.type("sha256sum /mnt/copy /two/copy").split()
    after = bounce_slots(shell)
    faults = shell.type("dmesg | grep -ic 'fault from'")
    shell.type("umount /mnt /two")
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(shell._run.stderr.data)
    ours, theirs = sha256(content), sha256(blob(SEED))
    assert {name: text.split()[0] for name, text in said.items()} == {
        "disk given": ours, "net taken": ours, "net given": theirs, "vsock taken": ours,
        "vsock given": theirs, "port given": theirs,
    }  # fmt: skip
    assert json.loads((tmp_path / "peers.json").read_text()) == {
        "net take": ours, "vsock take": ours, "port": ours,
        "console": "hello from hvc0\r\n",
    }  # fmt: skip
    assert (random, groups, faults) == ("4096", str(len(BEHIND)), "0")
    for number in range(2):
        disk = tmp_path / f"disk{number}.ext4"
        subprocess.run(["e2fsck", "-fn", str(disk)], check=True, timeout=60, capture_output=True)
        copy = tmp_path / f"copy{number}"
        dump = ["debugfs", "-R", f"dump copy {copy}", str(disk)]
        subprocess.run(dump, check=True, timeout=60, capture_output=True)
        assert sha256(copy.read_bytes()) == written[2 * number]
    # The IOMMU's own driver bounces its requests, two slots each, as many as its queue takes.
    assert after - before <= QUEUE_SIZE
    assert not re.search("iommu.*unable", shell.boot_output)
    check_report(tmp_path, moved=len(content) + 200 * 4096)
    check_trace(tmp_path)


def check_report(folder: Path, moved: int) -> None:
    report = report_of(folder)
    assert report["scheme"] == "cbit"
    assert set(report["io"]) == {"iommu", *BEHIND, "balloon"}
    for name in BEHIND:
        assert report["io"][name]["errors"] == report["io"][name]["refused"] == 0, name
    # The disks' bytes have come from and gone to private memory, all of them.
    for name in ("blk0", "blk1"):
        disk_io = report["io"][name]
        assert sum(disk_io["engine"]["bytes"].values()) == 0
        through = sum(disk_io["engine_lent"]["bytes"].values())
        assert through == disk_io["bytes_read"] + disk_io["bytes_written"] > moved
    lending = report["iommu"]
    assert lending["lends"] and lending["failed"] == lending["denied"] == 0
    # What a device reaches is what is mapped for it: rings and buffers, all in private memory.
    assert lending["maps"] > 1000 and lending["shared_maps"] == 0
    assert lending["lent_bytes_total"] > 2 * moved
    # Nearly all of it is the network's buffers for packets to come; the disks have a few pages.
    assert 0 < lending["average_lent_bytes"] <= lending["peak_lent_bytes"] < BOUNCE_BUFFER / 8
    assert sum(lending["lent_us"].values()) > 1000


def check_trace(folder: Path) -> None:
    """The trace tells of the same lending as the report."""
    told, lending = summarise(Trace(folder / "t"))["lending"], report_of(folder)["iommu"]
    assert set(told) == set(BEHIND)
    assert sum(each["lends"]["requests"] for each in told.values()) == lending["maps"]
    assert sum(each["lends"]["bytes"] for each in told.values()) == lending["lent_bytes_total"]
