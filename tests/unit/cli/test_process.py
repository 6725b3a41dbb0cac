"""Whose process it is: only the command's own may give up its rights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vmm.cli import process

ASK = "from vmm.cli import process; print(process.is_ours())"


def test_a_test_run_is_not_the_commands_process() -> None:
    assert not process.is_ours()


def test_a_program_that_calls_the_command_keeps_its_rights() -> None:
    said = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=60, check=True
    )

    assert said.stdout == "False\n"


def test_a_script_of_the_commands_name_is_the_command(tmp_path: Path) -> None:
    script = tmp_path / "pyvmm"
    script.write_text(ASK)

    said = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True
    )

    assert said.stdout == "True\n"
