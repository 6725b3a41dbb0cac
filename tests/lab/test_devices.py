"""All virtio devices at once under a stock kernel, with traffic on each of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Starter
from tests.lab.test_linux import MIB, Shell, ext4_image, report_of
from tests.support import vsock_program
from tests.support.lab_peers import BLOB_BYTES, blob
from vmm.lab.interpreter import executable
from vmm.lab.machine import Lab

SEED = 20
BALLOON_MIB = 96
NUMBERS, GIVEN_BYTES = 36_000, 200 << 10
"""What a card in a process moves: some 200 KB each way."""


# Takes the random number device away from its driver and gives it back, for ever: each time the
# rings of its queue are shared and unshared, whatever else is going on.
CONVERT = (
    "(cd /sys/bus/virtio/drivers/virtio_rng; d=$(ls -d virtio*); n=0; while [ -e /tmp/go ]; do "
    "echo $d >unbind; echo $d >bind; n=$((n+1)); echo $n >/tmp/rounds; done) &"
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def start(
    lab: Lab,
    lab_start: Starter,
    tmp_path: Path,
    options: list[str],
    disks: Sequence[str] = ("disk0.ext4", "disk1.ext4"),
) -> Shell:
    kernel = lab.guest_kernel("debian:6.12")
    words = [str(executable()), "-m", "tests.support.lab_peers"]
    words += [str(tmp_path / "peers.json"), str(SEED)]
    words += ["--kernel", str(kernel.image), "--initrd", str(lab.guest_initramfs(kernel))]
    words += ["--append", "quiet", "--report", str(tmp_path / "report.json"), *options]
    run = lab_start(
        words,
        program=True,
        disks=list(disks),
        outputs=[tmp_path / "peers.json", tmp_path / "report.json"],
        cpus=1,
    )
    return Shell(run)


@pytest.mark.parametrize(
    "process",
    [
        pytest.param("", id="in-pyvmm"),
        pytest.param(
            ",process",
            id="vsock-and-consoles-in-processes",
            marks=pytest.mark.skipif(
                not os.environ.get("PYVMM_LAB_SLOW"), reason="PYVMM_LAB_SLOW=1 runs it"
            ),
        ),
    ],
)
def test_stock_kernel_with_private_memory_moves_files_over_every_device(
    lab: Lab, lab_start: Starter, tmp_path: Path, process: str
) -> None:
    """All in pyvmm itself, or vsock and consoles in processes of their own."""
    content = os.urandom(2 * MIB + 4321)
    disks = []
    for number in range(2):
        folder = tmp_path / f"root{number}"
        folder.mkdir()
        disks.append(tmp_path / f"disk{number}.ext4")
        if number == 0:
            (folder / "file").write_bytes(content)
            vsock_program.build(folder / "vs")
        ext4_image(disks[number], folder)
    shell = start(
        lab,
        lab_start,
        tmp_path,
        [
            "--private-mem", "--cpus", "4",
            "--disk", "/dev/vde,queues=4", "--disk", "/dev/vdf",
            "--net", "tap=tap0,mac=02:00:00:00:00:02",
            "--vsock", f"path=/tmp/v,cid=7{process}", "--console", f"socket=/tmp/c{process}",
            "--console", f"socket=/tmp/p,name=test.port{process}", "--rng",
        ],
    )  # fmt: skip

    assert "AMD SEV" in shell.type("dmesg | grep 'Memory Encryption'")
    shell.type("mount -t ext4 /dev/vda /mnt; mkdir /two; mount -t ext4 /dev/vdb /two")
    shell.type("ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; touch /tmp/go")
    shell.type(CONVERT)
    said = {
        "net taken": shell.type("nc 192.0.2.1 5000 </mnt/file"),
        "net given": shell.type("nc 192.0.2.1 5001 </dev/null | sha256sum"),
        "vsock taken": shell.type("/mnt/vs connect 5000 </mnt/file"),
        "vsock given": shell.type("/mnt/vs connect 5001 </dev/null | sha256sum"),
        "vsock called": shell.type("/mnt/vs listen 6000 </mnt/file | sha256sum"),
    }
    name = shell.type("grep -l test.port /sys/class/virtio-ports/*/name | cut -d/ -f5")
    port = f"/dev/{name}"
    said["port given"] = shell.type(f"head -c {BLOB_BYTES} {port} | sha256sum")
    shell.type(f"cat /mnt/file >{port}")
    shell.type("echo hello from hvc0 >/dev/hvc0")
    random = shell.type("rm /tmp/go; wait; head -c 4096 /dev/hwrng | wc -c; cat /tmp/rounds")
    assert "virtio_rng" in shell.type("cat /sys/class/misc/hw_random/rng_current")
    queues = shell.type("ls /sys/block/vda/mq | wc -l")
    for mount in ("/mnt", "/two"):
        shell.type(f"cp /mnt/file {mount}/copy; mkdir {mount}/many")
        shell.type(f"(cd {mount}/many; for i in $(seq 200); do echo $i >$i; done; rm *5); sync")
    shell.type("echo 3 >/proc/sys/vm/drop_caches")
    copies = shell.type("sha256sum /mnt/copy /two/copy").split()
    shell.type("umount /mnt /two")
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(shell._run.stderr.data)
    peers = json.loads((tmp_path / "peers.json").read_text())
    ours, theirs = sha256(content), sha256(blob(SEED))
    assert {name: text.split()[0] for name, text in said.items()} == {
        "net taken": ours, "net given": theirs, "vsock taken": ours, "vsock given": theirs,
        "vsock called": theirs, "port given": theirs,
    }  # fmt: skip
    assert peers == {
        "net take": ours, "vsock take": ours, "vsock from guest's port": ours, "port": ours,
        "console": "hello from hvc0\r\n",
    }  # fmt: skip
    assert random.split()[0] == "4096"
    assert queues == "4"
    assert copies[::2] == [ours, ours]
    for disk in disks:
        subprocess.run(["e2fsck", "-fn", str(disk)], check=True, timeout=60, capture_output=True)
    report = report_of(tmp_path)
    check_devices(report)
    rounds = int(random.split()[1])
    assert rounds > 3
    assert report["conversions"]["unshare"]["calls"] > rounds


def check_devices(report: dict[str, Any]) -> None:
    assert report["guest"]["exit"] == "poweroff"
    for kind in ("share", "unshare"):
        assert report["conversions"][kind]["failed"] == 0
    io = report["io"]
    assert set(io) == {"blk0", "blk1", "net0", "vsock", "console", "rng"}
    for name, device in io.items():
        assert device["errors"] == device["refused"] == 0, name
    for name in ("net0", "vsock"):
        assert io[name]["bytes_read"] > BLOB_BYTES and io[name]["bytes_written"] > 2 * MIB


def test_stock_kernel_with_private_memory_moves_bytes_over_a_card_in_a_process(
    lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    """A little each way, while pages are converted beside it."""
    shell = start(
        lab,
        lab_start,
        tmp_path,
        ["--private-mem", "--net", "tap=tap0,mac=02:00:00:00:00:02,process", "--rng"],
        disks=(),
    )

    assert "AMD SEV" in shell.type("dmesg | grep 'Memory Encryption'")
    shell.type("ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; touch /tmp/go")
    shell.type(CONVERT)
    taken = shell.type(f"seq {NUMBERS} | nc 192.0.2.1 5000")
    given = shell.type(f"nc 192.0.2.1 5001 </dev/null | head -c {GIVEN_BYTES} | sha256sum")
    rounds = int(shell.type("rm /tmp/go; wait; cat /tmp/rounds").split()[0])
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(shell._run.stderr.data)
    ours = sha256(b"".join([b"%d\n" % number for number in range(1, NUMBERS + 1)]))
    assert taken.split() == [ours]
    assert json.loads((tmp_path / "peers.json").read_text())["net take"] == ours
    assert given.split()[0] == sha256(blob(SEED)[:GIVEN_BYTES])
    report = report_of(tmp_path)
    assert report["conversions"]["unshare"]["calls"] > rounds > 0
    card = report["io"]["net0"]
    assert card["errors"] == card["refused"] == card["process"]["deaths"] == 0
    assert card["process"]["seccomp"]
    assert card["bytes_read"] > GIVEN_BYTES and card["bytes_written"] > 5 * NUMBERS


def test_ordinary_vm_gives_memory_back_by_its_balloon_and_resets(
    lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    """Linux' balloon driver refuses to work with private memory."""
    for number in range(2):
        (tmp_path / f"disk{number}.ext4").write_bytes(bytes(MIB))
    # Without messages, so that the lines of devices other than disks are seen to be level ones.
    options = ["--mem", "384M", "--balloon", f"size={BALLOON_MIB}M", "--rng"]
    shell = start(lab, lab_start, tmp_path, [*options, "--append", "quiet pci=nomsi"])
    lines = shell.type("grep virtio /proc/interrupts").splitlines()
    # Fill most of it, and let it go: what the guest frees, it reports, and the host gets it back.
    shell.type("mount -t tmpfs -o size=80% none /tmp; dd if=/dev/zero of=/tmp/x bs=1M count=180")
    filled = shell.type("df -m /tmp | tail -1").split()[2]
    shell.type("rm /tmp/x; sleep 30")  # Linux reports a sixteenth of it every two seconds
    encrypted = shell.type("dmesg | grep -c 'AMD SEV'")
    assert shell.leave("reboot -f") == 0

    assert encrypted == "0"
    assert len(lines) == 2 and all("fasteoi" in line for line in lines), lines
    report = report_of(tmp_path)
    assert report["guest"]["exit"] == "reset"
    assert report["scheme"] == "none" and report["backings"]["private"] is None
    assert report["conversions"]["share"]["calls"] == 0
    balloon = report["io"]["balloon"]
    assert filled == "180"
    assert balloon["inflated"] == BALLOON_MIB * MIB and balloon["deflated"] == 0
    assert balloon["reported"] > 100 * MIB
    assert balloon["errors"] == balloon["refused"] == 0
    # The 180 MiB that were filled and the kernel's own would be some 250.
    assert report["residency"]["shared_bytes"] < 200 * MIB, report["residency"]
