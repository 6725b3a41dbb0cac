"""What README says can be pasted: its commands are there in the form .ci/run looks for, and its
policy is a policy."""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from vmm.cli.main import _refuse_early
from vmm.core.errors import UsageError
from vmm.lab import hosts
from vmm.lab.machine import with_kernel
from vmm.lab.options import parse as parse_lab
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


def commands() -> list[str]:
    """Every pyvmm command line of the documents, as it stands."""
    texts = [
        README,
        *((ROOT / "vmm" / name).read_text() for name in ("README.md", "bench/README.md")),
    ]
    return [line for text in texts for line in re.findall(r"^    (pyvmm .*)$", text, re.MULTILINE)]


def parse(words: list[str], machine: str = "x86_64") -> None:
    """As the command does it on such a machine, before it looks at any file. Raises UsageError."""
    name = words[0] if words else ""
    if name == "lab":
        command = parse_lab(words[1:])
        host = hosts.named(command.options.host)
        parse(with_kernel(command.arguments, host), host.architecture.name)
    elif name in ("report", "replay"):
        importlib.import_module(f"vmm.cli.{name}").parser().parse_args(words[1:])
    else:
        _refuse_early(words, machine)


def test_readme_command_lines_are_found() -> None:
    assert len(commands()) > 15
    assert {line.split()[1] for line in commands()} >= {
        "--kernel", "lab", "check", "selftest", "report", "replay", "bench",
    }  # fmt: skip


@pytest.mark.parametrize("line", commands(), ids=lambda line: line[:60])
def test_readme_command_lines_parse(line: str) -> None:
    parse(shlex.split(line)[1:])


@pytest.mark.parametrize(
    "line", ["lab --hots stock", "report --htlm x t", "bench --quik", "--kernal x", "check --jsn"]
)
def test_readme_command_that_is_misspelt_would_be_found(line: str) -> None:
    with pytest.raises(UsageError):
        parse(line.split())
