"""One command in a guest of the lab: from the initramfs, and from a root disk."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

from tests.lab.test_lab_command import environment
from vmm.lab.image import make_ext4
from vmm.lab.initramfs import applets
from vmm.lab.machine import Lab

_SECONDS = 240
_MIB = 1 << 20


def pyvmm(*words: str) -> list[str]:
    return [sys.executable, "-m", "vmm", "lab", "--lab-time-limit", "200", *words]


def root_disk(lab: Lab, folder: Path) -> Path:
    """A disk with one partition, in which there is busybox and nothing else."""
    stage = folder / "root"
    for name in ("bin", "dev", "proc", "sys", "mnt", "run", "tmp", "etc"):
        (stage / name).mkdir(parents=True)
    busybox = lab.packages.busybox(None)
    (stage / "bin" / "busybox").write_bytes(busybox.read_bytes())
    (stage / "bin" / "busybox").chmod(0o755)
    for name in applets(busybox):
        (stage / "bin" / name).symlink_to("busybox")
    (stage / "etc" / "here").write_text("from the disk\n")
    make_ext4(stage, folder / "part.ext4")
    content = (folder / "part.ext4").read_bytes()
    table = bytearray(_MIB)
    table[0x1FE:0x200] = b"\x55\xaa"
    table[0x1BE + 4] = 0x83
    struct.pack_into("<II", table, 0x1BE + 8, _MIB // 512, len(content) // 512)
    disk = folder / "disk.img"
    disk.write_bytes(bytes(table) + content)
    return disk


def test_command_on_a_root_disk_has_streams_files_and_its_status(lab: Lab, tmp_path: Path) -> None:
    disk = root_disk(lab, tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "in").write_text("from the host\n")
    command = (
        "cat /etc/here in -; grep ' / ' /proc/mounts | cut -d' ' -f1,3 | tail -n 1 >&2;"
        " echo made >out; ln -s /etc/passwd evil; echo left >/root-was-here; exit 7"
    )
    words = ["--private-mem", "--root", disk.name, "--share", "work", "--exec", command]

    result = subprocess.run(
        pyvmm("--lab-quiet", *words), input=b"typed\n", capture_output=True, cwd=tmp_path,
        env=environment(), check=False, timeout=_SECONDS,
    )  # fmt: skip

    said = result.stderr.decode()
    assert result.returncode == 7, said
    assert result.stdout == b"from the disk\nfrom the host\ntyped\n"
    assert "/dev/vda1 ext4\n" in said
    assert "left out what leads out of it or is no file: ./evil" in said
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["in", "out"]
    assert (tmp_path / "work" / "out").read_text() == "made\n"
    part = disk.read_bytes()[_MIB:]
    assert b"left\n" in part and b"root-was-here" in part


def test_signal_reaches_the_command_and_the_report_comes_back(lab: Lab, tmp_path: Path) -> None:
    command = "trap 'echo ended by TERM; exit 9' TERM; echo started; while :; do sleep 0.1; done"
    words = pyvmm("--private-mem", "--report", "report.json", "--exec", command)

    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd=tmp_path, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == b"ended by TERM\n"
            status = process.wait(_SECONDS)
        finally:
            process.kill()

    assert status == 9
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["guest"]["exit"] == "poweroff"
    assert report["conversions"]["share"]["calls"] > 0
