"""A stock guest, saved at work and restored by another pyvmm: minutes, when asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.bench import policies
from tests.lab.conftest import Starter
from tests.lab.save_and_restore import AWAY_SECONDS
from tests.lab.save_devices import CALLED, MAC
from tests.lab.test_linux import ext4_image
from tests.support import vsock_program
from vmm.lab.interpreter import executable
from vmm.lab.machine import Lab

_FORCE = "PYVMM_LAB_SLOW"
_SECONDS = 500.0
SCRIPT = Path(__file__).with_name("save_and_restore.py")

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not os.environ.get(_FORCE), reason=f"{_FORCE}=1 runs these tests"),
]


@pytest.mark.parametrize(("backing", "cpus"), [("memfd", 1), ("guest_memfd-mmap", 2), ("none", 1)])
def test_saved_guest_goes_on_where_it_was(
    lab: Lab, lab_start: Starter, tmp_path: Path, backing: str, cpus: int
) -> None:
    (tmp_path / "root").mkdir()
    image, disk = tmp_path / "image.ext4", tmp_path / "disk.ext4"
    ext4_image(image, tmp_path / "root")
    kernel = lab.guest_kernel("debian:6.12")
    words = [str(executable()), str(SCRIPT), policies.__file__, str(kernel.image)]
    words += [str(lab.guest_initramfs(kernel)), str(image), str(disk), backing, str(cpus)]

    run = lab_start(words, program=True, cpus=1, files=[image], outputs=[disk])
    assert run.wait(_SECONDS) == 0, bytes(run.stderr.data)
    seen: dict[str, Any] = json.loads(bytes(run.stdout.data).splitlines()[-1])

    print(json.dumps(seen, indent=1))
    assert seen["booted"]
    assert seen["dump"]["exit"] == seen["snapshot"]["exit"] == 0, seen
    assert seen["ended"] == [0, ""]
    assert seen["mark"] == "mark 42"
    # The guest knows how long it was away, as by the clock on the wall.
    assert abs(seen["off by"]) <= 3
    assert float(seen["up"].split()[0]) > AWAY_SECONDS
    assert int(seen["up"].split()[-1]) == cpus
    before, after = int(seen["lines before"]), int(seen["lines after"])
    assert after > before, "what ran in the background goes on"
    assert seen["complaints"] == ""
    assert seen["stopped"].startswith("unmounted")
    assert (seen["status"], seen["stderr"]) == (0, "")
    program = shutil.which("e2fsck", path="/usr/sbin:/sbin:/usr/bin")
    if program is not None:
        subprocess.run([program, "-fn", str(disk)], check=True, capture_output=True)
    assert re.fullmatch(rb"(line \d+\n)+", log_of(disk))


def test_devices_of_a_saved_guest_go_on(lab: Lab, lab_start: Starter, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").write_bytes(content)
    vsock_program.build(tmp_path / "root" / "vs")
    image = tmp_path / "image.ext4"
    ext4_image(image, tmp_path / "root")
    kernel = lab.guest_kernel("debian:6.12")
    script = Path(__file__).with_name("save_devices.py")
    words = [str(executable()), str(script), policies.__file__, str(kernel.image)]
    words += [str(lab.guest_initramfs(kernel)), str(image)]

    run = lab_start(words, program=True, cpus=1, files=[image])
    assert run.wait(_SECONDS) == 0, bytes(run.stderr.data)
    seen: dict[str, Any] = json.loads(bytes(run.stdout.data).splitlines()[-1])

    print(json.dumps(seen, indent=1))
    assert seen["booted"] and seen["snapshot"]["ok"], seen
    assert "3 packets received" in seen["ping before"] and "No such file" in seen["gone before"]
    assert seen["old"] == {"status": 0, "stderr": "", "calls": 1, "console": "before\n"}
    assert "status 4" in seen["gone"].splitlines(), (
        "the old connection is reset, and its program told"
    )
    assert seen["mac"] == MAC
    assert "3 packets received" in seen["ping"]
    assert seen["random"] == "64"
    assert seen["vsock"] == hashlib.sha256(content).hexdigest()
    assert seen["called"] == CALLED.decode().strip() and seen["heard"] == ["from the guest\n"]
    assert seen["port"] == "to the port\n"
    assert seen["complaints"] == ""
    assert seen["new"] == {"status": 0, "stderr": "", "calls": 1, "console": "after\n"}


def log_of(disk: Path) -> bytes:
    """What the guest has written, by debugfs; all its lines, where there is none."""
    program = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin")
    if program is None:
        return b"line 1\n"
    done = subprocess.run([program, "-R", "cat /log", str(disk)], capture_output=True, check=True)
    return done.stdout
