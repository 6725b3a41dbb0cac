"""What README says can be pasted: its commands are there in the form .ci/run looks for, and its
policy is a policy."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from vmm.cli.run_options import build_parser
from vmm.policy import Policy
from vmm.policy.loader import load_policy

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_readme_policy_example_is_a_policy(tmp_path: Path) -> None:
    block = re.search(r"    # frugal\.py\n((?:    .*\n|\n)+?)\n    pyvmm", README)
    assert block is not None
    (tmp_path / "frugal.py").write_text(textwrap.dedent(block[1]))

    assert isinstance(load_policy(f"{tmp_path}/frugal.py:Frugal"), Policy)


def test_readme_has_the_line_that_ci_runs() -> None:
    lines = re.findall(r"^    (python3 -m venv .* -m pytest)$", README, re.MULTILINE)

    assert len(lines) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "line", re.findall(r"^    (pyvmm --.*)$", README, re.MULTILINE), ids=lambda line: line[:60]
)
def test_readme_command_lines_parse(line: str) -> None:
    build_parser().parse_args(line.split()[1:])
