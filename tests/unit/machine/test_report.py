"""The report: honest words, the promised keys, and the file it is written to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vmm.conversion.accounting import Accounting, Refinements
from vmm.core.errors import UsageError
from vmm.core.ranges import Range
from vmm.exits.outcome import FAILED, PANIC, RESET, Outcome
from vmm.machine.machine import reset_outcome
from vmm.machine.report import (
    KERNEL_ENFORCED,
    NO_ISOLATION,
    POLICY_ENFORCED,
    ReportFile,
    build_report,
    isolation_of,
)
from vmm.memory.backing import Backing
from vmm.memory.backings.guest_memfd import (
    GuestMemfdBacking,
    MappedGuestMemfdBacking,
    PlainGuestMemfdBacking,
)
from vmm.memory.backings.memfd import MemfdBacking
from vmm.memory.guest_memory import GuestMemory

RAM = 1 << 20


def some_report(engine: str = "fd2fd", **moved: int) -> dict[str, Any]:
    memory = GuestMemory(
        [Range(0, RAM)], MemfdBacking(RAM), MemfdBacking(RAM), [Range(0x80000, 0x80000)]
    )
    memory.pwrite(b"x", 0)
    report: Mapping[str, Any] = build_report(
        scheme="cbit",
        not_taken={"attributes": "not here"},
        doorbell="port",
        memory=memory,
        outcome=Outcome("poweroff"),
        accounting=Accounting(),
        refinements=Refinements(),
        io={
            "blk0": {"requests": 3, "engine": {"name": engine, "bytes": moved}},
            "rng": {"requests": 0},
        },
        exits={"io": 1, "mmio": 5},
        ports={port: port for port in range(1, 31)},
        wall_seconds=1.23456,
    )
    memory.close()
    return dict(report)


def test_report_names_the_disk_that_maps_guest_memory() -> None:
    access = some_report(engine="mmap")["host_access"]["shared"]

    assert access == "pread/pwrite, mapped by blk0 (io=mmap)"
    assert some_report()["host_access"]["shared"] == "pread/pwrite"


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        ({"hva": 0, "buffer": 5}, "pread/pwrite"),
        ({"hva": 5}, "pread/pwrite, the mapping as the kernel's buffer by blk0 (io=auto)"),
    ],
)
def test_report_names_the_disk_whose_bytes_the_kernel_copied_to_the_mapping(
    moved: dict[str, int], words: str
) -> None:
    assert some_report("auto", **moved)["host_access"]["shared"] == words


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backing", "sentence", "claims", "admits"),
    [
        (
            GuestMemfdBacking,
            KERNEL_ENFORCED.format(how="SIGBUS"),
            "kernel-enforced",
            "the host's kernel itself",
        ),
        (
            PlainGuestMemfdBacking,
            KERNEL_ENFORCED.format(how="nobody can map them"),
            "kernel-enforced",
            "the host's kernel itself",
        ),
        (
            MappedGuestMemfdBacking,
            POLICY_ENFORCED,
            "rehearsal",
            "no protection from a malicious host",
        ),
        (None, NO_ISOLATION, "none", "all memory is shared"),
    ],
)
def test_isolation_says_how_strong_it_is_and_what_it_is_not(
    backing: Callable[[int, int], Backing] | None, sentence: str, claims: str, admits: str
) -> None:
    made = None if backing is None else backing(os.memfd_create("guest_memfd"), 4096)
    said = isolation_of(made)
    if made is not None:
        made.close()

    assert said == sentence
    assert said.startswith((claims, "policy-enforced " + claims))
    assert admits in said


def test_isolation_of_a_memfd_is_only_a_rehearsal() -> None:
    backing = MemfdBacking(4096)

    assert isolation_of(backing) == POLICY_ENFORCED
    backing.close()


def test_isolation_names_the_common_memory() -> None:
    backing = MemfdBacking(4096)

    said = isolation_of(backing, Range(0x90000, 0x8000))

    assert said.startswith(POLICY_ENFORCED + "; the 32 KiB at 0x90000, where processors start")
    backing.close()


# -- content --------------------------------------------------------------------------------------


def test_report_has_the_promised_keys() -> None:
    report = some_report()

    assert {"scheme", "doorbell", "backings", "isolation", "guest", "conversions", "residency",
            "io", "exits", "wall_s"} <= set(report)  # fmt: skip
    assert set(report["backings"]) == {"private", "shared"}
    assert set(report["guest"]) == {"exit", "reason"}
    for direction in ("share", "unshare"):
        assert set(report["conversions"][direction]) == {"calls", "bytes", "denied", "failed"}
    assert set(report["residency"]) == {"private_bytes", "shared_bytes", "other_side_bytes"}


def test_report_counts_pages_and_residency_of_both_sides() -> None:
    report = some_report()

    assert report["pages"] == {
        "ram_bytes": RAM, "private_bytes": 0x80000, "shared_bytes": 0x80000,
        "deferred_bytes": 0, "common_bytes": 0,
    }  # fmt: skip
    assert report["residency"] == {
        "private_bytes": 0, "shared_bytes": 4096, "other_side_bytes": 0,
    }  # fmt: skip


def test_report_puts_the_busiest_exits_and_ports_first() -> None:
    report = some_report()

    assert list(report["exits"]) == ["mmio", "io"]
    assert list(report["io_ports"].items())[:2] == [("0x1e", 30), ("0x1d", 29)]
    assert len(report["io_ports"]) == 20


# -- the file -------------------------------------------------------------------------------------


def test_report_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("x" * 100_000)
    file = ReportFile(str(path))

    file.write({"a": 1})
    file.close()

    assert json.loads(path.read_text()) == {"a": 1}


def test_report_file_may_be_a_pipe() -> None:
    read_end, write_end = os.pipe()
    file = ReportFile(f"/proc/self/fd/{write_end}")

    file.write({"a": 1})

    file.close()
    os.close(write_end)
    with os.fdopen(read_end) as stream:
        assert json.load(stream) == {"a": 1}


@pytest.mark.parametrize(
    ("name", "reason"), [("missing/r.json", "No such file"), (".", "Is a directory")]
)
def test_report_path_that_cannot_be_written_is_a_usage_error(
    tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=f"cannot be written: {reason}.*another path") as caught:
        ReportFile(str(tmp_path / name))

    assert caught.value.exit_status == 2


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file takes more than 5 bytes, as on a disk that gets full."""
    write = os.write

    def write_some(fd: int, data: bytes) -> int:
        if os.lseek(fd, 0, os.SEEK_CUR) + len(data) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_some)


@pytest.mark.usefixtures("no_room")
def test_report_on_a_full_disk_leaves_the_earlier_one_and_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    path.write_text("yesterday's")
    file = ReportFile(str(path))
    file.begin()

    file.write({"a": 1})
    file.close()

    assert os.listdir(tmp_path) == ["report.json.old"]
    assert (tmp_path / "report.json.old").read_text() == "yesterday's"
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"--report {path} could not be written: No space left on device; make room" in told
    assert f"an earlier one is {path}.old" in told


def test_report_of_an_earlier_run_is_not_there_while_a_guest_runs(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("yesterday's")
    (tmp_path / "report.json.old").write_text("somebody's")
    file = ReportFile(str(path))
    assert path.exists()  # no guest has run yet

    file.begin()  # and the process is killed

    assert sorted(os.listdir(tmp_path)) == ["report.json.old", "report.json.old2"]
    assert (tmp_path / "report.json.old").read_text() == "somebody's"


def test_report_written_takes_the_earlier_one_away(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("yesterday's")
    file = ReportFile(str(path))

    file.begin()
    file.write({"a": 1})
    file.close()

    assert os.listdir(tmp_path) == ["report.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_report_has_the_mode_that_a_new_file_has(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    former = os.umask(0o027)
    try:
        ReportFile(str(path)).write({"a": 1})
    finally:
        os.umask(former)

    assert path.stat().st_mode & 0o777 == 0o640


def test_report_through_a_link_goes_to_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "report.json")

    ReportFile(str(tmp_path / "link")).write({"a": 1})

    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "report.json").read_text()) == {"a": 1}


def test_report_to_what_a_descriptor_has_open_is_added_there(tmp_path: Path) -> None:
    with open(tmp_path / "stdout", "w+b") as stdout:
        stdout.write(b"console output\n")
        stdout.flush()
        file = ReportFile(f"/proc/self/fd/{stdout.fileno()}")
        file.begin()
        file.write({"a": 1})
        file.close()

    assert (tmp_path / "stdout").read_bytes().startswith(b'console output\n{\n  "a": 1')


def test_report_to_a_fifo_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(UsageError, match="fifo cannot be written: nobody reads it; give another"):
        ReportFile(str(tmp_path / "fifo"))


def test_report_to_a_fifo_with_a_reader_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    file = ReportFile(str(tmp_path / "fifo"))

    file.begin()
    file.write({"a": 1})
    file.close()

    with os.fdopen(reader, "rb") as stream:
        assert json.load(stream) == {"a": 1}


def test_report_to_a_full_device_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    file = ReportFile("/dev/full")

    file.write({"a": 1})
    file.close()

    assert "--report /dev/full could not be written: No space left" in capsys.readouterr().err


# -- how a reset is to be read --------------------------------------------------------------------

PANIC_LINE = b"[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs"


def test_reset_is_the_guests_wish() -> None:
    assert reset_outcome(b"Welcome!\r\n/ # reboot -f\r\n").exit == RESET


def test_reset_after_our_init_has_failed_says_why() -> None:
    outcome = reset_outcome(b"Run /init\r\npyvmm-init: failed: there is no /dev/vda\r\nreboot: x")

    assert (outcome.exit, outcome.reason) == (FAILED, "there is no /dev/vda")
    assert outcome.exit_status == 1


def test_reset_after_a_panic_is_a_panic_with_its_first_line() -> None:
    outcome = reset_outcome(b"...\r\n" + PANIC_LINE + b"\r\nCPU: 0\r\nRebooting in 1 s..\r\n")

    assert outcome.exit == PANIC
    assert outcome.reason == "Kernel panic - not syncing: VFS: Unable to mount root fs"
    assert outcome.exit_status == 1


def test_orderly_reboot_after_a_panic_on_the_screen_is_the_guests_wish() -> None:
    tail = PANIC_LINE + b"\r\n/ # reboot -f\r\n[ 9.1] reboot: Restarting system\r\n"

    assert reset_outcome(tail).exit == RESET


def test_panic_of_binary_garbage_is_cut_and_readable() -> None:
    outcome = reset_outcome(b"Kernel panic - not syncing: \xff\xfe" + b"x" * 5000)

    assert outcome.exit == PANIC
    assert len(outcome.reason) <= 200
