"""The bench guest on this machine's KVM: every engine serves it, and says which way bytes went."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import firmware
from vmm.memory import transfer

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

ROOT = Path(__file__).resolve().parents[2]
KIB = 1 << 10
READS, WRITES = "rr4096x8n64 rs131072x4n16", "wr4096x8n64 ws131072x4n16"
BYTES = 64 * 4096 + 16 * 128 * KIB


# Each test leaves in the guest's buffers what it read last, which the next one writes.
SHUFFLE = "rs131072x8n13 ws131072x8n16 rr4096x8n99 wr4096x8n64 rs1048576x2n3 ws1048576x2n2"
ENGINES = [name for name in transfer.ENGINES if name != "vmfd"]  # only a changed KVM has that


def run(
    tmp_path: Path, tests: str, engine: str, *options: str, content: bytes | None = None
) -> tuple[int, str, dict[str, Any]]:
    """Status, output and report of a run of the bench guest with a disk of 4 MiB."""
    disk, report = tmp_path / "disk", tmp_path / "report.json"
    disk.write_bytes(os.urandom(4 << 20) if content is None else content)
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "--kernel", firmware.bench_path(), "--mem", "128M",
         "--append", f"-- {tests}", "--disk", f"{disk},io={engine}", "--report", str(report),
         *options],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, json.loads(report.read_text())


@pytest.mark.parametrize(
    ("engine", "ways"),
    [
        ("pread", {"buffer": 2 * BYTES}),
        ("fd2fd", {"splice": 2 * BYTES}),
        ("hva", {"hva": 2 * BYTES}),
        ("auto", {"buffer": 2 * 64 * 4096, "hva": 2 * 16 * 128 * KIB}),
        ("mmap", {"memcpy": 2 * BYTES}),
    ],
)
def test_bench_guest_is_served_the_engines_way(
    tmp_path: Path, engine: str, ways: dict[str, int]
) -> None:
    status, output, report = run(tmp_path, f"{READS} {WRITES}", engine, "--allow-mapped-io")

    assert status == 0
    assert output.splitlines()[-1] == "done"
    results = re.findall(
        r"^result (\S+): \d+ ticks, \d+ notifications, \d+ idle, 0 maps, 0 unmaps, 0 kicks$",
        output,
        re.MULTILINE,
    )
    assert results == [*READS.split(), *WRITES.split()]
    counts = report["io"]["blk0"]
    assert counts["requests"] == 160
    assert (counts["bytes_read"], counts["bytes_written"]) == (BYTES, BYTES)
    assert {way: moved for way, moved in counts["engine"]["bytes"].items() if moved} == ways
    assert counts["engine"]["fallbacks"] == 0


def test_every_engine_leaves_the_same_disk(tmp_path: Path) -> None:
    """The guest writes what it has read to other places, so that a byte gone astray shows."""
    content = random.Random(14).randbytes(4 << 20)
    found = {}
    for engine in ENGINES:
        (tmp_path / engine).mkdir()
        status, _, _ = run(tmp_path / engine, SHUFFLE, engine, "--allow-mapped-io", content=content)
        assert status == 0
        found[engine] = hashlib.sha256((tmp_path / engine / "disk").read_bytes()).hexdigest()

    assert len(set(found.values())) == 1, found
    assert hashlib.sha256(content).hexdigest() not in found.values()


def test_bench_guest_told_nonsense_says_so_and_ends(tmp_path: Path) -> None:
    status, output, _ = run(tmp_path, "rr4095x8n64", "auto")

    assert status == 0
    assert "error a test that makes no sense" in output


def test_bench_guest_exits_as_often_as_it_is_told(tmp_path: Path) -> None:
    _, output, report = run(tmp_path, "e1234", "auto")

    assert "result e1234: " in output
    assert report["io_ports"]["0x80"] == 1234


CALLS = "read,readv,pread64,preadv,preadv2,write,writev,pwrite64,pwritev,pwritev2"


def bytes_through_user_space(tmp_path: Path, engine: str) -> int:
    """What system calls moved between the disk or guest memory and pyvmm's own memory while the
    guest read 8 MiB, by strace's account."""
    disk, log = tmp_path / "disk", tmp_path / "strace.log"
    disk.write_bytes(os.urandom(4 << 20))
    subprocess.run(
        ["strace", "-f", "-y", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(log),
         sys.executable, "-m", "vmm", "--kernel", firmware.bench_path(), "--mem", "128M",
         "--append", "-- rs131072x8n64", "--disk", f"{disk},io={engine}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60, check=True,
    )  # fmt: skip
    moved = re.findall(
        rf"\(\d+<(?:/memfd:pyvmm-shared[^>]*|{re.escape(str(disk))})>.*= (\d+)$",
        log.read_text(),
        re.MULTILINE,
    )
    return sum(map(int, moved))


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, to count what it says")
def test_fd2fd_keeps_guest_data_out_of_user_space(tmp_path: Path) -> None:
    data = 64 * 128 * KIB

    through_buffer = bytes_through_user_space(tmp_path, "pread")
    inside_kernel = bytes_through_user_space(tmp_path, "fd2fd")

    # Both load the guest and look at rings and headers; one of them reads and writes the data.
    assert inside_kernel < data // 16
    assert 0 <= through_buffer - 2 * data < data // 16


def test_bench_guest_without_private_memory_lends_none(tmp_path: Path) -> None:
    _, output, _ = run(tmp_path, "brr4096x1n4", "auto")

    assert output.splitlines()[-1] == "error a test for private memory, of which there is none"
