"""README.md is what a person needs in five minutes, and has the line that CI runs. That its blocks
work is shown in tests/docs.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.markdown import README, blocks
from vmm.policy import Policy
from vmm.policy.loader import load_policy

MOST_LINES = 120


def test_readme_has_the_two_lines_to_start_with() -> None:
    lines = re.findall(r"^    (python3.*)$", README.read_text(), re.MULTILINE)

    assert lines == [
        "python3 -m venv .venv && .venv/bin/pip install -q . && "
        ".venv/bin/pyvmm --private-mem --report report.json",
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && "
        ".venv/bin/python -m pytest",
    ]


def test_ci_runs_the_line_of_the_readme() -> None:
    script = (README.parent / ".ci" / "run").read_text()
    found = re.search(r"sed -n 's/(.*)/\\1/p' README\.md", script)
    assert found is not None

    pattern = found[1].replace(r"\(", "(").replace(r"\)", ")")
    lines = re.findall(pattern, README.read_text(), re.MULTILINE)

    assert len(lines) == 1 and lines[0].endswith("-m pytest")


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_readme_policy_is_a_policy(tmp_path: Path) -> None:
    (block,) = (each for each in blocks(README) if each.file is not None)
    (tmp_path / "frugal.py").write_text(block.text)

    assert isinstance(load_policy(f"{tmp_path}/frugal.py:Frugal"), Policy)
