"""Stock kernels in the lab, booted by pyvmm to a shell, with all of their RAM in private memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Starter
from vmm.arch.x86_64.bounce_buffer import early_allocations
from vmm.arch.x86_64.kernel import load_kernel_image
from vmm.arch.x86_64.layout import ram_ranges
from vmm.core.ranges import Range
from vmm.lab.machine import Lab
from vmm.lab.run import LabRun
from vmm.replay.replay import Replay
from vmm.trace.cost import learn, requests_of
from vmm.trace.reader import Trace
from vmm.trace.summary import summarise

PROMPT = b"/ # "
BOOT_SECONDS = 240.0
COMMAND_SECONDS = 240.0  # of a machine with other work, too
MIB = 1 << 20
RAM_BYTES = 512 * MIB

# Compression of the payload: zstd, LZ4 (legacy), zstd again with the newest boot code.
KERNELS = ("debian:6.12", "debian:6.1", "debian:7.3")

REPORT = ("--report", "report.json")


def linux(kernel: str = KERNELS[0]) -> list[str]:
    return ["--kernel", kernel, "--append", "quiet"]


class Shell:
    """The guest's shell: a command typed over the console, and what it printed."""

    def __init__(self, run: LabRun) -> None:
        self._run = run
        self.boot_output = run.expect(PROMPT, BOOT_SECONDS).decode(errors="replace")

    def type(self, command: str) -> str:
        """Run a command; its output without the echo, the carriage returns and the prompt."""
        self._run.send(command.encode() + b"\n")
        text = self._run.expect(PROMPT, COMMAND_SECONDS).decode(errors="replace")
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "")
        return text.split("\n", 1)[1].removesuffix(PROMPT.decode()).strip()

    def leave(self, command: str) -> int:
        """Type a command that ends the guest; pyvmm's exit status."""
        self._run.send(command.encode() + b"\n")
        return self._run.wait(COMMAND_SECONDS)


def report_of(tmp_path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    return report


def ext4_image(path: Path, folder: Path) -> None:
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", str(folder), str(path)], check=True, timeout=60
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_stock_kernel_boots_privately_and_its_disk_holds_what_it_wrote(
    kernel: str, lab_start: Starter, tmp_path: Path
) -> None:
    content = os.urandom(3 * MIB + 4321)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "from-host").write_bytes(content)
    disk = tmp_path / "disk.ext4"
    ext4_image(disk, tmp_path / "root")

    run = lab_start(
        [*linux(kernel), "--private-mem", "--disk", "disk.ext4", "--trace", "t", *REPORT],
    )
    shell = Shell(run)
    assert kernel.removeprefix("debian:") in shell.type("uname -r")
    assert "AMD SEV" in shell.type("dmesg | grep 'Memory Encryption'")
    assert "virtio" in shell.type("cat /proc/interrupts")
    bounce_buffer = check_bounce_buffer(shell.type("dmesg | grep 'software IO TLB: mapped'"))
    shell.type("mount -t ext4 /dev/vda /mnt")
    read = shell.type("sha256sum /mnt/from-host")
    shell.type("dd if=/dev/urandom of=/mnt/from-guest bs=4096 count=700 2>/dev/null; sync")
    shell.type("echo 3 >/proc/sys/vm/drop_caches")
    written = shell.type("sha256sum /mnt/from-guest")
    shell.type("umount /mnt")
    status = shell.leave("poweroff -f")

    assert status == 0, bytes(run.stderr.data)
    assert read.split()[0] == hashlib.sha256(content).hexdigest()
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, timeout=60, capture_output=True)
    copy = tmp_path / "copy"
    subprocess.run(
        ["debugfs", "-R", f"dump from-guest {copy}", str(disk)],
        check=True,
        timeout=60,
        capture_output=True,
    )
    assert copy.stat().st_size == 700 * 4096
    assert written.split()[0] == hashlib.sha256(copy.read_bytes()).hexdigest()
    check_report(report_of(tmp_path))
    check_trace(tmp_path / "t", report_of(tmp_path), bounce_buffer)


def check_bounce_buffer(message: str) -> Range:
    """It is where we expected it: else prefaulting it was for nothing."""
    found = re.search(r"mapped \[mem (0x[0-9a-f]+)-(0x[0-9a-f]+)\]", message)
    assert found, message
    start, end = (int(number, 16) for number in found.groups())
    expected = early_allocations(ram_ranges(RAM_BYTES), initrd_bytes=0)
    # Linux prints the first address past it.
    assert expected is not None and expected.contains(Range(start, end - start)), message
    return Range(start, end - start)


def check_report(report: dict[str, Any]) -> None:
    """What every private boot with a disk must show."""
    assert report["scheme"] == "cbit"
    assert report["doorbell"] == "hypercall"
    assert report["backings"] == {"private": "guest_memfd-mmap", "shared": "memfd"}
    assert report["isolation"].startswith("policy-enforced rehearsal")
    assert report["guest"]["exit"] == "poweroff"
    share, unshare = report["conversions"]["share"], report["conversions"]["unshare"]
    assert share["calls"] > 100
    assert share["failed"] == share["denied"] == unshare["failed"] == unshare["denied"] == 0
    pages, residency = report["pages"], report["residency"]
    # The 64 MiB bounce buffer (swiotlb) is shared, and nothing else of that size.
    assert 64 * MIB < pages["shared_bytes"] < 80 * MIB
    assert pages["private_bytes"] + pages["shared_bytes"] == pages["ram_bytes"] == RAM_BYTES
    # All RAM starts private: what is shared at the end was converted and not converted back.
    assert share["bytes"] - unshare["bytes"] == pages["shared_bytes"]
    assert 0 < residency["private_bytes"] <= pages["private_bytes"]
    assert 0 < residency["shared_bytes"] <= pages["shared_bytes"]
    disk = report["io"]["blk0"]
    assert disk["bytes_read"] > 3 * MIB and disk["bytes_written"] > 700 * 4096
    assert disk["errors"] == disk["refused"] == 0


def check_trace(folder: Path, report: dict[str, Any], bounce_buffer: Range) -> None:
    """The trace tells of the same run as the report, and a replay that allows all repeats it."""
    trace = Trace(folder)
    told = summarise(trace)
    assert (told["complete"], told["torn_events"]) == (True, 0)
    for kind in ("share", "unshare"):
        counted = report["conversions"][kind]
        assert told["conversions"][kind]["requests"] == counted["calls"]
        assert told["conversions"][kind]["failed"] == 0
    assert told["memory"]["shared_bytes_last"] == report["pages"]["shared_bytes"]
    assert {name: exits["count"] for name, exits in told["exits"].items()} == report["exits"]
    assert told["io"]["blk0"]["requests"] == report["io"]["blk0"]["requests"]
    # What is a guess from the requests alone is what the guest said.
    found = told["bounce_buffer"]
    assert Range(found["gpa"], found["bytes"]) == bounce_buffer
    requests = requests_of(trace)
    with closing(Replay(trace, requests, [])) as replay:
        replay.run(learn(trace, requests), round(told["seconds"] * 1e9))
    converted = sum(report["conversions"][kind]["bytes"] for kind in ("share", "unshare"))
    assert replay.converted_bytes == requests.changed.sum() == converted
    assert replay.refused == []


def test_bare_vmlinux_boots_with_memory_above_4_gib(
    lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    with load_kernel_image(lab.guest_kernel("debian:6.1").image) as image:
        size = os.fstat(image.source.fd).st_size
        (tmp_path / "vmlinux").write_bytes(os.pread(image.source.fd, size, 0))

    run = lab_start([*linux(str(tmp_path / "vmlinux")), "--private-mem", "--mem", "3200M", *REPORT])
    shell = Shell(run)
    assert shell.type("uname -r").startswith("6.1")
    kib = int(shell.type("head -1 /proc/meminfo").split()[1])
    status = shell.leave("poweroff -f")

    assert status == 0
    assert kib > 2700 << 10
    pages = report_of(tmp_path)["pages"]
    assert pages["private_bytes"] + pages["shared_bytes"] == 3200 * MIB


def test_shell_on_a_terminal_takes_keys_and_ctrl_a_x_quits(
    lab_start: Starter, tmp_path: Path
) -> None:
    run = lab_start([*linux(), "--private-mem=memfd", *REPORT], terminal=(24, 80))
    shell = Shell(run)

    run.send(b"echo here; sleep 1000\n")
    run.expect(b"\r\nhere\r\n", COMMAND_SECONDS)
    run.send(b"\x03")  # Ctrl-C is the guest's: it ends the sleep, not pyvmm
    run.expect(PROMPT, COMMAND_SECONDS)
    assert shell.type("echo $((6 * 7))") == "42"
    run.send(b"\x01x")

    assert run.wait(COMMAND_SECONDS) == 0
    report = report_of(tmp_path)
    assert report["guest"]["exit"] == "quit"
    assert report["backings"]["private"] == "memfd"


# Asks the lab machine's kernel what both backings weigh, at every 100th conversion: shmem pages
# are memfd's, unevictable ones guest_memfd's (nothing else of that machine grows meanwhile).
_WITNESS = """
import json, os
from vmm.policy import Allow, Policy

class Witness(Policy):
    def __init__(self):
        self.seen, self.calls = [], 0
    def on_share(self, event, view):
        if self.calls % 100 == 0:
            fields = dict(line.split(":") for line in open("/proc/meminfo"))
            kib = {name: int(fields[name].split()[0]) for name in ("Shmem", "Unevictable")}
            r = view.residency()
            self.seen.append([kib["Shmem"], kib["Unevictable"], r.shared_bytes, r.private_bytes])
            with open(os.environ["WITNESS"], "w") as file:
                json.dump(self.seen, file)
        self.calls += 1
        return Allow()
    on_unshare = on_share
"""


def test_residency_agrees_with_the_host_kernels_own_count_and_a_panic_is_told(
    lab_start: Starter, tmp_path: Path
) -> None:
    (tmp_path / "witness.py").write_text(_WITNESS)
    seen = tmp_path / "seen.json"
    run = lab_start(
        # The policy reads /proc/meminfo, and writes what it has seen.
        [*linux(), "--private-mem", "--policy", "witness.py:Witness", "--sandbox=off", *REPORT],
        outputs=[seen],
        environment={"WITNESS": str(seen)},
    )

    status = Shell(run).leave("echo c >/proc/sysrq-trigger")

    assert status == 1
    assert b"Kernel panic - not syncing: sysrq triggered crash" in bytes(run.stderr.data)
    assert report_of(tmp_path)["guest"]["exit"] == "panic"
    samples = json.loads(seen.read_text())
    assert len(samples) >= 5
    first, last = samples[0], samples[-1]
    shmem, unevictable = ((last[i] - first[i]) * 1024 for i in (0, 1))
    shared, private = (last[i] - first[i] for i in (2, 3))
    assert abs(private) > 4 * MIB  # there was something to agree about
    assert abs(unevictable - private) < MIB
    assert abs(shmem - shared) < MIB
