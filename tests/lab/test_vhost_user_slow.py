"""A stock kernel with virtiofsd and qemu-storage-daemon behind its devices; when asked for."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.lab.conftest import Starter
from tests.lab.slow import slow
from tests.lab.test_linux import Shell, report_of
from tests.support.lab_back_ends import (
    DISK_SOCKET,
    FS_SOCKET,
    STORAGE_DAEMON,
    VIRTIOFSD,
    blob,
)
from vmm.lab.interpreter import executable
from vmm.lab.machine import Lab

SEED = 21
MIB = 1 << 20

pytestmark = slow


def programs() -> list[Path]:
    """The back ends and the libraries that they are linked with; the test is skipped without."""
    found = [Path(each) for each in VIRTIOFSD if Path(each).exists()][:1]
    daemon = Path(STORAGE_DAEMON)
    if not found or not daemon.exists():
        pytest.skip("virtiofsd and qemu-storage-daemon are not installed here")
    found.append(daemon)
    said = subprocess.run(["ldd", *map(str, found)], capture_output=True, text=True, check=True)
    words = [word for word in said.stdout.split() if word.startswith("/")]
    return found + sorted({Path(word) for word in words if not word.endswith(":")})


def test_a_private_guest_mounts_a_folder_and_outlives_its_disks_back_end(
    lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    kernel = lab.guest_kernel("debian:6.12")
    words = [str(executable()), "-m", "tests.support.lab_back_ends"]
    words += [str(tmp_path / "results.json"), str(SEED)]
    words += ["--kernel", str(kernel.image), "--initrd", str(lab.guest_initramfs(kernel))]
    words += ["--append", "quiet", "--private-mem", "--report", str(tmp_path / "report.json")]
    words += ["--disk", f"vhost-user={DISK_SOCKET}", "--fs", f"shared,vhost-user={FS_SOCKET}"]
    run = lab_start(
        words,
        program=True,
        files=programs(),
        outputs=[tmp_path / "results.json", tmp_path / "report.json"],
    )
    shell = Shell(run)

    assert "AMD SEV" in shell.type("dmesg | grep 'Memory Encryption'")
    shell.type("mount -t virtiofs shared /mnt")
    read = shell.type("sha256sum /mnt/from-host")
    shell.type("head -c 1000000 /dev/urandom >/mnt/from-guest; mkdir /mnt/many")
    shell.type("(cd /mnt/many; for i in $(seq 50); do echo $i >$i; done; rm *5); sync")
    written = shell.type("sha256sum /mnt/from-guest")
    many = shell.type("cat /mnt/many/* | wc -l")
    shell.type("dd if=/mnt/from-guest of=/dev/vda bs=4096 count=200 oflag=direct 2>/dev/null")
    back = shell.type("dd if=/dev/vda bs=4096 count=200 iflag=direct 2>/dev/null | sha256sum")
    same = shell.type("head -c 819200 /mnt/from-guest | sha256sum")
    shell.type("dd if=/dev/vda of=/dev/null bs=4096 iflag=direct 2>/tmp/dd & touch /mnt/kill-disk")
    shell.type("while [ ! -e /mnt/killed ]; do usleep 100000; done; wait")
    failed = shell.type("dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct")
    shell.type("touch /mnt/start-disk; while [ ! -e /mnt/started ]; do usleep 100000; done")
    # The restart itself is under way when the command has returned.
    again = shell.type(
        "until dd if=/dev/vda bs=4096 count=200 iflag=direct 2>/dev/null >/tmp/again; do "
        "usleep 100000; done; sha256sum </tmp/again"
    )
    still = shell.type("cat /mnt/from-host | wc -c")
    shell.type("umount /mnt")
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    results, report = json.loads((tmp_path / "results.json").read_text()), report_of(tmp_path)
    assert read.split()[0] == hashlib.sha256(blob(SEED)).hexdigest()
    assert written.split()[0] == results["from-guest"]
    assert many == "45"
    assert back == same
    assert "error" in failed
    assert again.splitlines()[-1] == same  # behind a command line that was wrapped
    assert int(still) == len(blob(SEED))
    assert b"blk0 has lost its back end" in bytes(run.stderr.data)
    uses = report["vhost_user"]
    assert (uses["fs0"]["connected"], uses["fs0"]["lost"]) == (True, 0)
    disk = uses["blk0"]
    assert (disk["connected"], disk["lost"], disk["restarts"]) == (True, 1, 1)
    assert report["io"]["blk0"]["errors"] > 0
    assert report["backings"]["shared"] == "memfd-sealed"
