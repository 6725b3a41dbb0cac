"""`pyvmm completion`: scripts that the shells themselves are asked about, where they are there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Command
from vmm.cli import main as cli
from vmm.cli.completion import script
from vmm.cli.grammar import SHELLS, commands

ROOT = Path(__file__).resolve().parents[3]

ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_pyvmm; printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(folder: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    (folder / "script").write_text(script("bash"))
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK_BASH, "bash", str(folder / "script"), "pyvmm", *words],
        cwd=folder, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    # Without a shell that completes, `compopt` has nothing to set options of.
    assert "syntax" not in done.stderr
    return set(done.stdout.split("\n")) - {""}


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash on PATH")


@needs_bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["rep"], {"report", "replay"}),
        (["--priv"], {"--private-mem"}),
        (["--scheme", "c"], {"cbit"}),
        (["--private-mem", "=", "guest_memfd-"], {"guest_memfd-mmap"}),
        (["run", "--private-mem", "="], {"auto", "guest_memfd", "guest_memfd-mmap", "memfd"}),
        (["check", "--j"], {"--json"}),
        (["ctl", "socket", "fo"], {"follow"}),
        (["lab", "--host", "bo"], {"bochs"}),
        (["lab", "--lab-o"], {"--lab-out", "--lab-offline"}),
        (["lab", "--rep"], {"--report"}),
        (["completion", "z"], {"zsh"}),
        (["help", "meas"], {"measure"}),
        (["check", "sel"], set()),
    ],
)
def test_bash_offers_what_may_stand_there(
    tmp_path: Path, words: list[str], offered: set[str]
) -> None:
    assert bash(tmp_path, *words) == offered


@needs_bash
@pytest.mark.parametrize(
    "words", [["--kernel"], ["report"], ["--trace"], ["ctl"], ["report", "one"], ["--disk"]]
)
def test_bash_offers_files_where_a_file_is_wanted(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "my image").write_text("")

    assert bash(tmp_path, *words, "my") == {"my image"}


@needs_bash
def test_bash_offers_every_option_of_every_command(tmp_path: Path) -> None:
    for command in commands():
        if command.options:
            assert bash(tmp_path, command.name, "--") >= {
                name for name in command.option_names if name.startswith("--")
            }


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_good_to_its_shell(tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell} on PATH")
    (tmp_path / "script").write_text(script(shell))

    done = subprocess.run(
        [shell, "-n", str(tmp_path / "script")],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_script_names_every_command_and_option(shell: str) -> None:
    text = script(shell)

    for command in commands():
        assert command.name in text
        for name in command.option_names:
            word = {"fish": f"-l {name[2:]}" if name[:2] == "--" else f"-s {name[1:]}"}
            assert word.get(shell, name) in text, name


def test_every_command_of_the_program_is_known() -> None:
    assert {command.name for command in commands()} == set(cli._COMMANDS)


def test_words_are_read_where_nothing_is_installed_or_compiled() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vmm.cli.grammar as g; "
    code += "from vmm.cli.manual import manual; print(len(g.commands()), len(manual('1')))"
    code += "; assert not {'cffi', 'numpy', 'rich', 'kvm_bindings'} & sys.modules.keys()"

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required"),
        (["bsh"], "completion for bsh: did you mean bash?"),
        (["tcsh"], "completion for tcsh: give one of|did you mean zsh"),
        (["bash", "zsh"], "unrecognized arguments: zsh"),
    ],
)
def test_shell_that_is_not_known_is_told(command: Command, words: list[str], message: str) -> None:
    result = command("completion", *words)

    assert any(part in result.complaint for part in message.split("|"))
    assert result.status == 2


def test_help_says_where_the_scripts_go(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["help", "completion"])

    assert ended.value.code == 0
    assert "bash-completion/completions/pyvmm" in capsys.readouterr().out
