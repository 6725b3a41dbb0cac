"""The bench guest with private memory: the bytes arrive by each way, and nothing stays lent."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmm.bench import iommu_guest
from vmm.bench.iommu_guest import WAYS
from vmm.bench.processes import environment
from vmm.cli.main import main

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

DISK_BYTES = 4 << 20
# firmware/x86_64/bench/data.S: what 8 bytes hold is their place on the disk xor one of these.
READ_KEY, WRITTEN_KEY = 0x64697363706C6163, 0x7772697474656E21
BOUNCE_BUFFER = 64 << 20
LENDING = [way for way in WAYS if way != "bounced"]


def pattern(key: int) -> bytes:
    return struct.pack(f"<{DISK_BYTES // 8}Q", *(place ^ key for place in range(0, DISK_BYTES, 8)))


def run(disk: Path, way: str, tests: str, backing: str = "memfd") -> tuple[str, dict[str, Any]]:
    """Output and report of a run that ends by itself."""
    report = disk.with_name("report.json")
    words = iommu_guest.command(str(disk), way, backing, str(report), tests)
    done = subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout, json.loads(report.read_text())


def counts(output: str) -> list[dict[str, int]]:
    """Of each result: its numbers by their names."""
    lines = [line for line in output.splitlines() if line.startswith("result ")]
    return [
        {name: int(number) for number, name in re.findall(r"(\d+) (\w+)(?:,|$)", line)}
        for line in lines
    ]


@pytest.mark.parametrize("backing", ["memfd", "guest_memfd-mmap"])
@pytest.mark.parametrize("way", WAYS)
def test_reads_by_each_way_bring_the_disks_bytes(tmp_path: Path, way: str, backing: str) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(pattern(READ_KEY))
    letter = WAYS[way]

    output, report = run(
        disk, way, f"{letter}rr4096x8n64v {letter}rs131072x4n32v {letter}rr1048576x1n4v", backing
    )

    assert output.splitlines()[-1] == "done", output
    assert len(counts(output)) == 3
    assert report["io"]["blk0"]["bytes_read"] == 64 * 4096 + 32 * 131072 + (4 << 20)
    assert "lent_bytes" not in report["pages"]


@pytest.mark.parametrize("way", WAYS)
def test_writes_by_each_way_arrive_on_the_disk(tmp_path: Path, way: str) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))

    output, report = run(disk, way, f"{WAYS[way]}ws65536x4n{DISK_BYTES >> 16}v")

    assert output.splitlines()[-1] == "done", output
    assert disk.read_bytes() == pattern(WRITTEN_KEY)
    assert "lent_bytes" not in report["pages"]


@pytest.mark.parametrize("way", WAYS)
def test_one_wrong_byte_on_the_disk_is_seen_by_the_guest(tmp_path: Path, way: str) -> None:
    disk = tmp_path / "disk"
    wrong = bytearray(pattern(READ_KEY))
    wrong[DISK_BYTES - 1] ^= 1
    disk.write_bytes(wrong)

    output, _ = run(disk, way, f"{WAYS[way]}rs65536x4n{DISK_BYTES >> 16}v")

    assert output.splitlines()[-1] == "error bytes that are not the disk's"


def test_bounced_guest_shares_its_buffer_and_queue_and_asks_no_iommu(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))

    output, report = run(disk, "bounced", "brr4096x8n64")

    assert report["conversions"]["share"]["bytes"] == BOUNCE_BUFFER + 4 * 4096
    assert "iommu" not in report
    (told,) = counts(output)
    assert (told["maps"], told["unmaps"], told["kicks"]) == (0, 0, 0)


@pytest.mark.parametrize("way", LENDING)
def test_lending_guest_shares_the_iommus_queue_alone_and_lends_what_is_in_flight(
    tmp_path: Path, way: str
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))

    _, report = run(disk, way, f"{WAYS[way]}rr4096x8n64")

    assert report["conversions"]["share"] == {
        "calls": 1, "bytes": 5 * 4096, "denied": 0, "failed": 0,
    }  # fmt: skip
    lending = report["iommu"]
    buffers, queue = 8 * 4096, 4 * 4096
    assert lending["peak_lent_bytes"] == buffers + queue
    assert (lending["lent_bytes"], lending["mappings"]) == (0, 0)
    assert lending["maps"] == lending["unmaps"] == (2 if way == "premapped" else 65)
    assert report["io"]["iommu"]["faults"] == 0


def test_kicks_are_what_the_way_says(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))
    kicks, maps = {}, {}

    for way in LENDING:
        (told,) = counts(run(disk, way, f"{WAYS[way]}rr4096x8n64")[0])
        kicks[way], maps[way] = told["kicks"], (told["maps"], told["unmaps"])

    assert kicks["premapped"] == 0
    assert kicks["strict"] == 128
    assert kicks["lazy"] == 65  # one for each map, and one for the unmaps of the last turn
    assert 2 <= kicks["grouped"] < 64
    assert maps == {"premapped": (0, 0), "grouped": (64, 64), "lazy": (64, 64), "strict": (64, 64)}


def test_request_that_is_no_whole_page_is_refused_by_the_iommu(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))

    output, report = run(disk, "strict", "srr512x1n4")

    assert output.splitlines()[-1] == "error a request that the IOMMU refuses"
    assert report["io"]["blk0"]["requests"] == 0


def test_lending_without_an_iommu_says_that_there_is_none(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))

    output, _ = run(disk, "bounced", "srr4096x1n4")

    assert output.splitlines()[-1] == "error no virtio-iommu function on PCI bus 0"


def test_section_compares_each_way_with_the_bounced_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = iommu_guest.Work("rr", 4096, 8, 64)
    monkeypatch.setattr(iommu_guest, "QUICK", (work,))
    out = tmp_path / "out.json"

    words = ["bench", "--quick", "--rounds", "2", "--only", "iommu", "--json", str(out)]
    assert main(words) == 0

    every = json.loads(out.read_text())["series"]
    series = [one for one in every if one["section"] == "iommu"]
    assert {one["subject"] for one in series} == set(WAYS)
    assert len(series) == len(WAYS) * len(iommu_guest.UNITS) - 1  # bounced counts no pieces
    assert all(len(one["samples"]) == 2 for one in series)
    ratios = [one for one in series if "against bounced" in one["case"]]
    assert {one["subject"] for one in ratios if one["samples"] == [1.0, 1.0]} == {"bounced"}
    calls = [one for one in every if one["section"] == "iommu-calls"]
    assert [len(one["samples"]) for one in calls] == [10] * 4


def test_page_is_shared_and_mapped_as_often_as_the_guest_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(DISK_BYTES))

    output, report = run(disk, "strict", "c25 m30")

    converted, mapped = counts(output)
    assert (converted["maps"], converted["kicks"]) == (0, 0)
    assert (mapped["maps"], mapped["unmaps"], mapped["kicks"]) == (30, 30, 60)
    assert report["conversions"]["share"]["calls"] == 25 + 2  # the page before, the IOMMU's queue
    assert report["conversions"]["unshare"]["calls"] == 25 + 1
    assert report["iommu"]["maps"] == 30 + 1  # the disk's queue
    assert report["io_ports"]["0x508"] == 25 * 2 + 3
    assert "lent_bytes" not in report["pages"]
