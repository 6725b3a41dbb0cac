"""`crash` on dumps of stock guests: a gigabyte of downloads and some minutes, when asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Starter
from tests.lab.dump_guest import MARK
from tests.lab.programs import KERNEL, guest, program_words, result_of
from tests.lab.slow import slow
from vmm.core.errors import HostError
from vmm.core.kernel_file import kernel_release
from vmm.lab.apt import QEMU_SUITE
from vmm.lab.machine import Lab
from vmm.lab.programs import unpacked_command

COMMANDS = "sys\nps\nlog\nbt -a\nbt {sleeper}\nmod\nexit\n"

pytestmark = [pytest.mark.timeout(600), slow]


class Crash:
    """Debian's crash, and the guest's kernel with its debug information."""

    def __init__(self, lab: Lab, image: Path) -> None:
        """Raises HostError where they aren't to be had."""
        packages = lab.packages
        release = kernel_release(image)
        assert release is not None
        name = f"linux-image-{release}-dbg"

        def download(path: Path) -> None:
            packages.apt.download([name], path)
            shutil.rmtree(path / "usr" / "lib" / "debug" / "lib")  # a gigabyte: the modules'

        self._tree = packages.tree(
            "crash",
            "downloading crash into the cache",
            lambda path: packages.apt.download_closure(["crash"], QEMU_SUITE, path),
            "Debian's crash",
        )
        debug = packages.tree(f"vmlinux-{release}", f"downloading {name}", download, name)
        self._kernel = debug / "usr" / "lib" / "debug" / "boot" / f"vmlinux-{release}"

    def __call__(self, core: Path, commands: str, *options: str) -> tuple[int, str]:
        """Exit status, and what it says."""
        program = self._tree / "usr" / "bin" / "crash"
        words = [*unpacked_command(self._tree, program), *options, str(self._kernel), str(core)]
        done = subprocess.run(
            words, input=commands, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
            check=False, text=True, errors="replace", cwd=core.parent,
        )  # fmt: skip
        return done.returncode, done.stdout


@pytest.fixture
def crash(lab: Lab) -> Crash:
    try:
        return Crash(lab, lab.guest_kernel(KERNEL).image)
    except HostError as error:
        if os.environ.get("PYVMM_LAB_REQUIRED"):
            raise
        pytest.skip(f"crash or the kernel's debug information cannot be had: {error}")


def dumped(
    lab: Lab, lab_start: Starter, backing: str, cpus: int, *cores: Path
) -> tuple[dict[str, Any], str]:
    """What the guest says of itself, and crash's commands for it."""
    words = program_words("dump_guest", *guest(lab), backing, cpus, *cores)
    seen = result_of(lab_start(words, program=True, cpus=1, outputs=list(cores)))
    assert seen["booted"] and seen["mark"] == "done", seen
    assert (seen["status"], seen["stderr"]) == (0, "")
    return seen, COMMANDS.format(sleeper=seen["sleeper"])


def shows_the_guest(said: str, seen: dict[str, Any], cpus: int) -> None:
    """What crash says is what the guest has said."""
    assert f"RELEASE: {seen['release']}" in said, said
    assert re.search(rf"^ +CPUS: {cpus}$", said, re.MULTILINE)
    assert re.search(rf"^ +{seen['sleeper']} +\d+ .* sleep$", said, re.MULTILINE)
    assert f"] {MARK}" in said
    for cpu in range(cpus):
        assert re.search(rf"^PID: .* CPU: {cpu} .*\n(.*\n)*? #0 \[", said, re.MULTILINE), said
    sleeper = said[said.index(f"PID: {seen['sleeper']} ") :]
    assert re.search(r"#0 \[[0-9a-f]+\] __schedule at [0-9a-f]+\n", sleeper)
    assert "do_nanosleep at " in sleeper and "entry_SYSCALL_64_after_hwframe at " in sleeper
    assert "virtio_blk" in said


def test_crash_opens_a_dump_of_a_guest_without_private_memory(
    lab: Lab, lab_start: Starter, crash: Crash, tmp_path: Path
) -> None:
    core = tmp_path / "core"
    seen, commands = dumped(lab, lab_start, "none", 2, core)

    status, said = crash(core, commands, "-s")

    assert seen["core"]["vmcoreinfo"] is True
    assert status == 0, said
    shows_the_guest(said, seen, 2)


def test_crash_opens_a_dump_with_private_memory_and_none_without(
    lab: Lab, lab_start: Starter, crash: Crash, tmp_path: Path
) -> None:
    core, whole = tmp_path / "core", tmp_path / "whole"
    seen, commands = dumped(lab, lab_start, "memfd", 1, core, whole)

    without, why = crash(core, commands, "-d1")
    status, said = crash(whole, commands, "-s")

    assert seen["core"]["vmcoreinfo"] is False and seen["whole"]["vmcoreinfo"] is True
    assert seen["whole"]["private_bytes"] == seen["core"]["left_out_bytes"] > 0
    assert without == 1
    assert re.search(r"read error: kernel virtual address: [0-9a-f]+ ", why), why[-2000:]
    assert status == 0, said
    shows_the_guest(said, seen, 1)
