"""A stock kernel with private memory under a debugger: what it sees, and what it doesn't."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.markdown import DOCS, blocks
from tests.lab.conftest import Starter
from tests.lab.programs import guest, program_words, result_of
from tests.lab.slow import slow
from vmm.lab.image import lay_out_program
from vmm.lab.machine import Lab

pytestmark = slow
PAGE = DOCS / "howto" / "debug-with-gdb.md"
_NOT_TAKEN = shutil.ignore_patterns("test", "idlelib", "lib2to3", "config-*", "dist-packages")


def lay_out(stage: Path, name: str) -> None:
    """A program of this machine with its libraries, and `run`, which starts it in the lab."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"no {name}: install Debian's packages gdb and binutils")
    stage.mkdir()
    lay_out_program(stage, Path(program).resolve(), ["ldd"], None, str(stage))


def lay_out_gdb(stage: Path) -> None:
    """gdb with the Python that is in it, without which it doesn't start."""
    lay_out(stage, "gdb")
    asked = 'python import os, gdb; print(os.path.dirname(os.__file__), gdb.PYTHONDIR, sep="\\n")'
    told = subprocess.run(
        ["gdb", "-nx", "-batch", "-ex", asked], stdout=subprocess.PIPE, text=True, check=True
    )
    library, own = map(Path, told.stdout.split())
    shutil.copytree(library, stage / "lib" / library.name, ignore=_NOT_TAKEN)
    shutil.copytree(own.parent, stage / "data")
    run = stage / "run"
    start = run.read_text().replace("exec ", f"export PYTHONHOME={stage}\nexec ", 1)
    run.write_text(start.replace('"$@"', f'--data-directory={stage}/data "$@"'))


def test_stock_kernel_with_private_memory_under_gdb_by_the_page_is_stopped_and_not_seen_into(
    lab: Lab, lab_start: Starter, tmp_path: Path
) -> None:
    symbols = tmp_path / "symbols.py"
    symbols.write_text(next(b.text for b in blocks(PAGE) if b.file == "symbols.py"))
    gdb, binutils = tmp_path / "gdb", tmp_path / "binutils"
    lay_out_gdb(gdb)
    lay_out(binutils, "as")

    words = program_words("debugged", *guest(lab), "gdb", symbols, gdb, binutils)
    seen = result_of(lab_start(words, program=True, cpus=1, files=[gdb, binutils]))

    said = seen["said"]
    unseen = r"0x([0-9a-f]+) <ksys_sync>:\tCannot access memory at address 0x\1\n"
    sync = re.findall(unseen, said)
    assert len(sync) == 2, said  # before the breakpoint and at it
    assert "page tables are out of reach: GPA 0x" in said and "is private" in said
    # QEMU's emulated SVM takes INT3 for a software interrupt, which KVM doesn't intercept.
    assert "lacks: software breakpoints in kernel mode or user mode\n" in said
    assert f"Hardware assisted breakpoint 1 at 0x{sync[0]}" in said
    assert f"Breakpoint 1, 0x{sync[0]} in ksys_sync ()\n" in said
    assert "\nksys_sync in section" in said and "\nksys_sync + " in said
    assert re.search(r"^0x[0-9a-f]+ 0x[0-9a-f]+ shared$", said, re.MULTILINE)
    assert re.search(r"^0x[0-9a-f]+ 0x[0-9a-f]+ private$", said, re.MULTILINE)
    assert seen["report"]["private_bytes"] == 0 and seen["report"]["refused"]["reads"] >= 2


def test_rehearsals_private_memory_is_read_and_watched_on_two_vcpus(
    lab: Lab, lab_start: Starter
) -> None:
    words = program_words("debugged", *guest(lab), "rehearsal")

    seen = result_of(lab_start(words, program=True, cpus=1))

    assert seen["stopped"].startswith("T02")
    assert seen["software"] == seen["watch"] == "OK"
    assert len(seen["code"]) == 32 and seen["code"] != "00" * 16
    assert seen["does not show"]
    assert seen["patched"]
    assert "watch:" in seen["watched"] and seen["value"] == "07000000"
    assert "swbreak" in seen["hit"] and seen["at"]
    assert seen["step"].startswith("T05") and 0 < seen["stepped"] < 16
    assert seen["report"]["sees_private"] and seen["report"]["private_bytes"] > 16
