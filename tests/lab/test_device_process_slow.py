"""A stock kernel whose disk's process is killed under load: minutes, when asked for."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from tests.lab.conftest import Starter
from tests.lab.programs import guest, program_words, result_of
from tests.lab.slow import slow
from tests.lab.test_linux import ext4_image
from vmm.lab.machine import Lab

pytestmark = slow


def test_file_system_is_whole_after_its_disk_s_process_was_killed_under_load(
    lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    disk = tmp_path / "disk.ext4"
    ext4_image(disk, tmp_path / "root")
    report = tmp_path / "report.json"
    words = program_words("device_process", *guest(lab), "/dev/vde", report)

    seen = result_of(lab_start(words, program=True, cpus=1, disks=["disk.ext4"], outputs=[report]))

    print(json.dumps(seen, indent=2))
    assert (seen["booted"], seen["mounted"]) == (True, "yes")
    files = re.search(r"^(\d+) files$", seen["over"], re.MULTILINE)
    assert files is not None and 0 < int(files[1]) < 600
    assert "error" in seen["dmesg"].lower()
    assert (seen["unmounted"][-3:], seen["restart"], seen["again"][-3:]) == ("yes", 0, "yes")
    assert seen["lost"] == ""
    assert (seen["after"][-3:], seen["status"]) == ("yes", 0)
    process = json.loads(report.read_text())["io"]["blk0"]["process"]
    assert (process["deaths"], process["restarts"]) == (1, 1)
    assert process["last_end"] == "was killed by SIGKILL"
    print(json.dumps(process))
    fsck = subprocess.run(["e2fsck", "-fn", str(disk)], check=True, timeout=60, capture_output=True)
    print(fsck.stdout.decode())
