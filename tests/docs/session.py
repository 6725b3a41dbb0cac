"""A page as a reader follows it: its blocks from top to bottom, in one folder, empty at first."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.docs.markdown import ROOT, Block, Command, commands

WORDS = ("kvm", "lab", "parse")
RUN = ("python", "console")
SHOWN = ("text", "json", "toml", "c", "diff", "ini", "sh")
BLOCK_SECONDS = 90.0
LAB_SECONDS = 900.0

# Between two commands' output; no program prints it.
_MARK = "\x1e"


def check_head(block: Block) -> None:
    """Raise ValueError for a language or word that the tests don't know."""
    if block.language not in (*RUN, *SHOWN):
        raise ValueError(
            f"{block}: language {block.language!r}; use one of {', '.join((*RUN, *SHOWN))}"
        )
    for word in block.words:
        if word not in WORDS and "." not in word:
            raise ValueError(f"{block}: {word!r}; use one of {', '.join(WORDS)}, or a file's name")


class Session:
    """Carries blocks out. Failures are AssertionErrors that name page and line."""

    def __init__(self, folder: Path, programs: Path) -> None:
        """`folder` is where the reader is, `programs` a folder for `pyvmm` and `python`."""
        self._folder = folder
        for name, words in (("pyvmm", "-m vmm"), ("python", ""), ("python3", "")):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
            program.chmod(0o755)
        installed = Path(sys.executable).parent  # what came with Python packages: pytest, dask
        self._environment = os.environ | {
            "PATH": f"{programs}:{installed}:{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(ROOT),
            # A page may tell readers to write to their home; what was downloaded is kept.
            "HOME": str(folder),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
            "COLUMNS": "80",
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
            # As where pyvmm is installed, whether this checkout is or not.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": "vmm.scenario.pytest_plugin",
        }

    def carry_out(self, block: Block) -> None:
        """Write the block's file, run it, or look whether it can be read."""
        seconds = LAB_SECONDS if "lab" in block.words else BLOCK_SECONDS
        if block.language == "console":
            self._run_console(block, seconds)
        elif block.language == "python" and block.file is None:
            self._run_python(block, seconds)
        else:
            self.read(block)

    def read(self, block: Block) -> None:
        """Do no more than write its file and see that it can be parsed."""
        if block.file is not None:
            path = self._folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        if block.language == "python":
            compile(block.text, str(block), "exec")
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json" and "..." not in block.text:
            json.loads(block.text)

    def _run_python(self, block: Block, seconds: float) -> None:
        done = subprocess.run(
            [sys.executable, "-c", block.text],
            cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}: status {done.returncode}\n{done.stderr}"

    def _run_console(self, block: Block, seconds: float) -> None:
        """One bash for the block; each command must succeed, unless `echo $?` is the next one."""
        lines = commands(block)
        # The mark between two commands must not change the status that the second may ask for.
        mark = f"status=$?; printf '{_MARK}%d{_MARK}' $status; (exit $status)\n"
        script = "".join(f"{each.text}\n{mark}" for each in lines)
        said = self._folder.parent / f"{self._folder.name}.said"
        with open(said, "wb") as output:
            shell = subprocess.Popen(
                ["bash", "--norc", "-c", script],
                cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
            try:
                shell.wait(seconds)
            finally:  # with all that it has put in the background
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()
        parts = said.read_bytes().decode(errors="replace").replace("\r\n", "\n").split(_MARK)
        answers = list(zip(parts[::2], parts[1::2], strict=False))
        for number, command in enumerate(lines):
            where = f"{block.page.name}:{command.line}: {command.text}"
            assert number < len(answers), f"{where}\nwas not reached:\n{''.join(parts)}"
            output_text, status = answers[number]
            if not _asks_status(lines[number + 1 : number + 2]):
                assert status == "0", f"{where}\nstatus {status}:\n{output_text}"
            if command.output:
                assert agrees(command.output, output_text), f"{where}\nsaid:\n{output_text}"


def _asks_status(following: list[Command]) -> bool:
    return bool(following) and following[0].text.strip() == "echo $?"


def agrees(shown: tuple[str, ...], said: str) -> bool:
    """Whether output is as the page shows it: `...` stands for anything, alone for any lines.

    Of blanks side by side, one counts: columns are as wide as their numbers.
    """
    pattern = ""
    for line in map(_narrow, shown):
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*"
        else:
            pattern += r"[^\n]*".join(map(re.escape, line.split("..."))) + r"\n"
    text = "".join(f"{_narrow(line)}\n" for line in said.splitlines())
    return re.fullmatch(rf"(?:{pattern})\n*", text) is not None


def _narrow(line: str) -> str:
    return re.sub(r"[ \t]+", " ", line.rstrip())
