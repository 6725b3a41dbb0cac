"""Guest memory as a file for other programs: dd, grep and Python on a payload's memory.

The payload stands still under a debugger that nobody attaches, so that its pages stay as they are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import select
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import vmm
from kvm_bindings import sandbox
from tests.support import command
from tests.support.command import Session
from vmm.core.errors import HostError

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("usable_kvm")]

PRIVATE = 0x20_0000  # the payload's first private byte
MEMORY = 64 << 20
KEEPER = """
from vmm.policy import Allow, Deny, Policy
class Keeper(Policy):
    def on_io(self, event, view):
        named = event.device.startswith("file:")
        return Deny() if named and event.device == "file:dd" else Allow()
"""

OPENER = """
import sys
from vmm.policy import Allow, Policy
class Opener(Policy):
    def on_io(self, event, view):
        if event.device.startswith("file:"):
            try:
                open("/etc/passwd").close()
                how = "may"
            except PermissionError:
                how = "may not"
            print(event.device, how, file=sys.stderr, flush=True)
        return Allow()
"""


@pytest.fixture(autouse=True)
def fuse(tmp_path: Path) -> None:
    from vmm.control.memory_file.place import Place

    try:
        Place(str(tmp_path / "tried")).leave(mounted=False)
    except HostError as error:
        pytest.skip(str(error))


@contextmanager
def mounted(folder: Path, *more: str) -> Iterator[Session]:
    """A payload that hasn't started, with its memory at `folder`."""
    gdb = folder.with_name("gdb")
    words = ["--private-mem=memfd", "--mem", "64M", "--memory-file", str(folder), *more]
    with Session([*words, "--gdb", str(gdb)]) as session:
        assert session.process.stderr is not None
        while b"waits for a debugger" not in session.process.stderr.readline():
            assert session.process.poll() is None
        yield session
        if session.process.poll() is None:
            session.process.send_signal(signal.SIGINT)
            session.process.wait()


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["sh", "-c", line], cwd=folder, capture_output=True, timeout=60, check=False
    )


def test_programs_read_what_is_shared_and_nothing_else(tmp_path: Path) -> None:
    folder, written = tmp_path / "memory", tmp_path / "report"
    with mounted(folder, "--report", str(written)):
        file = folder / "memory"
        about = file.stat()
        first = shell("dd if=memory bs=1M status=none | wc -c", folder)
        beyond = shell(f"dd if=memory bs=4096 skip={PRIVATE // 4096} count=1", folder)
        wrote = shell("printf hello | dd of=memory bs=1 seek=4096 conv=notrunc", folder)
        found = shell("dd if=memory bs=4096 skip=1 count=1 status=none | grep -c hello", folder)
        spoiled = shell(f"printf x | dd of=memory bs=1 seek={PRIVATE} conv=notrunc", folder)
        truncated = shell("printf x >memory", folder)
        states = (folder / "states").read_text().splitlines()
        listed = sorted(os.listdir(folder))

    assert stat.S_IMODE(about.st_mode) == 0o600
    assert about.st_size == MEMORY and about.st_blocks == PRIVATE // 512
    assert first.stdout.strip() == str(PRIVATE).encode()
    assert beyond.returncode and b"Permission denied" in beyond.stderr
    assert wrote.returncode == 0 and found.stdout == b"1\n"
    assert spoiled.returncode and b"Permission denied" in spoiled.stderr
    assert truncated.returncode and b"not permitted" in truncated.stderr
    assert states == [
        f"{0:#018x} {PRIVATE:#x} shared",
        f"{PRIVATE:#018x} {MEMORY - PRIVATE:#x} private",
    ]
    assert listed == ["changes", "memory", "states"]
    assert not folder.exists()
    counts: dict[str, Any] = json.loads(written.read_text())["memory_file"]
    assert counts["refused"] >= 2 and counts["bytes_written"] == 5


def test_python_finds_short_counts_errnos_and_holes(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with mounted(folder):
        fd = os.open(folder / "memory", os.O_RDWR)
        short = os.pread(fd, 1 << 20, PRIVATE - 4096)
        large = os.pread(fd, 1 << 20, 0)
        with pytest.raises(PermissionError):
            os.pread(fd, 1, PRIVATE)
        assert os.pread(fd, 1, MEMORY) == b""
        assert os.lseek(fd, 0, os.SEEK_HOLE) == PRIVATE
        with pytest.raises(OSError) as nothing:
            os.lseek(fd, PRIVATE, os.SEEK_DATA)
        with pytest.raises(OSError) as no_map:
            mmap.mmap(fd, 4096, mmap.MAP_SHARED)
        direct = os.open(folder / "memory", os.O_RDONLY | os.O_DIRECT)
        page = mmap.mmap(-1, 4096)
        assert os.preadv(direct, [page], 0x10_0000) == 4096
        copied = bytes(page)
        os.close(direct)
        os.close(fd)

    assert len(short) == 4096 and len(large) == 1 << 20
    assert nothing.value.errno == errno.ENXIO
    assert no_map.value.errno == errno.ENODEV
    assert copied != bytes(4096), "the payload's code"


def test_change_of_a_page_is_polled_for(tmp_path: Path) -> None:
    folder, control = tmp_path / "memory", tmp_path / "control"
    with mounted(folder, "--control", str(control)):
        fd = os.open(folder / "changes", os.O_RDONLY)
        before = int(os.pread(fd, 32, 0))
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(0) == []

        done = command.run("ctl", str(control), "convert", "share", hex(PRIVATE), "0x1000")
        assert done.returncode == 0, done.stdout

        assert poll.poll(20_000) == [(fd, select.POLLIN)]
        assert int(os.pread(fd, 32, 0)) > before
        assert poll.poll(0) == []
        assert os.pread(os.open(folder / "memory", os.O_RDONLY), 4096, PRIVATE) == bytes(4096)
        os.close(fd)


def test_policy_hears_the_openers_name(tmp_path: Path) -> None:
    (tmp_path / "keeper.py").write_text(KEEPER)
    folder = tmp_path / "memory"
    with mounted(folder, "--policy", f"{tmp_path}/keeper.py:Keeper"):
        by_dd = shell("dd if=memory bs=4096 count=1", folder)
        by_head = shell("head -c 4096 memory | wc -c", folder)

    assert b"Permission denied" in by_dd.stderr
    assert by_head.stdout.strip() == b"4096"


@pytest.mark.skipif(sandbox.landlock_version() == 0, reason="this kernel has no Landlock")
def test_policy_asked_by_the_mounts_thread_opens_no_files(tmp_path: Path) -> None:
    (tmp_path / "opener.py").write_text(OPENER)
    folder = tmp_path / "memory"
    with mounted(folder, "--policy", f"{tmp_path}/opener.py:Opener") as session:
        read = shell("head -c 4096 memory | wc -c", folder)
        assert session.process.stderr is not None
        told = session.process.stderr.readline()

    assert read.stdout.strip() == b"4096"
    assert told == b"file:head may not\n"


def test_mount_of_a_killed_run_is_found_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with mounted(folder, "--sandbox=off") as session:
        session.process.kill()
        session.process.wait()
    with pytest.raises(OSError) as gone:
        os.stat(folder)
    assert gone.value.errno == errno.ENOTCONN

    with mounted(folder):
        assert (folder / "memory").stat().st_size == MEMORY

    assert not folder.exists()


def test_killed_run_with_a_sandbox_leaves_nothing_mounted(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with mounted(folder) as session:
        assert session.process.stderr is not None
        session.process.kill()
        session.process.stderr.read()  # until the process outside the sandbox has ended, too

    assert not folder.exists()


def test_open_file_outlives_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    with mounted(folder):
        fd = os.open(folder / "memory", os.O_RDONLY)

    with pytest.raises(OSError):
        os.pread(fd, 1, 0)
    with contextlib.suppress(OSError):  # nobody is there to be told
        os.close(fd)
    assert not folder.exists()


def test_machine_in_a_program_has_no_memory_file(tmp_path: Path) -> None:
    config = vmm.MachineConfig(private_memory="memfd", memory_file=str(tmp_path / "memory"))

    with pytest.raises(vmm.UsageError, match="memory_file"), vmm.Machine(config) as machine:
        machine.start()


def test_folder_that_was_there_stays(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    with mounted(folder):
        pass

    assert os.listdir(folder) == [] and not os.path.ismount(folder)


@pytest.mark.parametrize("kind", ["file", "full", "nowhere", "empty name", "mounted"])
def test_wrong_place_is_one_line_and_status_2(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "place"
    if kind == "file":
        folder.write_text("")
    elif kind == "full":
        folder.mkdir()
        (folder / "x").write_text("")
    words = {"nowhere": str(tmp_path / "no" / "such"), "empty name": ""}.get(kind, str(folder))
    if kind == "mounted":
        with mounted(folder):
            done = command.run("--private-mem", f"--memory-file={words}")
    else:
        done = command.run("--private-mem", f"--memory-file={words}")

    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1 and b"--memory-file" in done.stderr
