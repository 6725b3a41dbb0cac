"""The manual page: all that can be said is in it, and man shows it as it is meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.cli.grammar import commands
from vmm.cli.manual import manual

ROOT = Path(__file__).resolve().parents[3]


def shown(page: str) -> tuple[str, str]:
    """What a reader sees, in one line, and what troff has to complain about."""
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-rLL=200n", "-P-c", "-P-b", "-P-u", "-P-o"],
        input=page, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return " ".join(done.stdout.split()), done.stderr


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff on PATH")
def test_page_shows_every_command_and_option_with_its_help() -> None:
    text, complaints = shown(manual("1.2"))

    assert complaints == ""
    assert "pyvmm 1.2" in text
    for command in commands():
        assert re.search(rf"\b{command.name}\b", text)
        for option in command.options:
            assert all(name in text for name in option.names)
            assert " ".join(option.help.split()[:3]).lower() in text.lower(), option


def test_page_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vmm.cli.manual as m; "
    code += "sys.stdout.write(m.manual('1'))"
    made = [
        subprocess.run(
            [sys.executable, "-I", "-c", code], env=env, cwd=tmp_path,
            capture_output=True, text=True, check=True,
        ).stdout
        for env in ({"COLUMNS": "40", "TZ": "UTC"}, {"COLUMNS": "200", "PYTHONHASHSEED": "7"})
    ]  # fmt: skip

    assert made == [manual("1"), manual("1")]


def test_page_says_nothing_of_this_machine() -> None:
    page = manual("1")

    assert str(ROOT) not in page
    assert not re.search(r"\b20[0-9]{2}\b(?!M)", page)


def test_line_never_begins_with_what_troff_would_obey() -> None:
    requests = re.findall(r"(?m)^[.'](\w+)", manual("1"))

    assert set(requests) <= {"TH", "SH", "TP", "PP", "B", "nf", "fi"}
