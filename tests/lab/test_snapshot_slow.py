"""A stock guest, saved at work and restored by another pyvmm: minutes, when asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.lab.conftest import Starter
from tests.lab.programs import guest, program_words, result_of
from tests.lab.save_and_restore import AWAY_SECONDS
from tests.lab.save_devices import CALLED, MAC
from tests.lab.slow import slow
from tests.lab.test_linux import ext4_image
from tests.support import vsock_program
from vmm.lab.machine import Lab

pytestmark = [pytest.mark.timeout(600), slow]


@pytest.mark.parametrize(("backing", "cpus"), [("memfd", 1), ("guest_memfd-mmap", 2), ("none", 1)])
def test_saved_guest_goes_on_where_it_was(
    lab: Lab, lab_start: Starter, tmp_path: Path, backing: str, cpus: int
) -> None:
    (tmp_path / "root").mkdir()
    image, disk = tmp_path / "image.ext4", tmp_path / "disk.ext4"
    ext4_image(image, tmp_path / "root")
    words = program_words("save_and_restore", *guest(lab), image, disk, backing, cpus)

    seen = result_of(lab_start(words, program=True, cpus=1, files=[image], outputs=[disk]))

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
    subprocess.run(["e2fsck", "-fn", str(disk)], check=True, timeout=60, capture_output=True)
    words = ["debugfs", "-R", "cat /log", str(disk)]
    log = subprocess.run(words, check=True, timeout=60, capture_output=True).stdout
    assert re.fullmatch(rb"(line \d+\n)+", log)


def test_devices_of_a_saved_guest_go_on(lab: Lab, lab_start: Starter, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").write_bytes(content)
    vsock_program.build(tmp_path / "root" / "vs")
    image = tmp_path / "image.ext4"
    ext4_image(image, tmp_path / "root")
    words = program_words("save_devices", *guest(lab), image)

    seen = result_of(lab_start(words, program=True, cpus=1, files=[image]))

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
