"""The pyvmm commands in a shell line, and whether pyvmm would take their words."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex

from vmm.cli import ctl
from vmm.cli.main import _refuse_early, _without_help
from vmm.core.errors import UsageError
from vmm.lab import hosts
from vmm.lab.distribution import parse_request
from vmm.lab.machine import with_kernel
from vmm.lab.options import parse as parse_lab


def pyvmm_commands(line: str) -> list[list[str]]:
    """The words of each `pyvmm ...` in a line for the shell: redirections and what isn't pyvmm's
    left out."""
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = []
    words: list[str] = []
    skip = False
    for token in [*lexer, ";"]:
        if skip:
            skip = False
        elif set(token) <= set("<>&") and set(token) & set("<>"):
            if words and words[-1].isdigit():
                words.pop()
            skip = True
        elif set(token) <= set("();|&"):
            while words and re.fullmatch(r"(\w+=.*|time|timeout|exec|\d+)", words[0]):
                words.pop(0)
            if words and words[0].rpartition("/")[2] == "pyvmm":
                found.append(words[1:])
            words = []
        else:
            words.append(token)
    return found


def parse(words: list[str], machine: str = "x86_64") -> None:
    """As the command does it on such a machine, before it looks at any file. Raises UsageError."""
    name = words[0] if words else ""
    while "--config" in words:  # a file that another block writes
        at = words.index("--config")
        words = [*words[:at], *words[at + 2 :]]
    try:
        if name == "lab":
            _parse_lab(words[1:])
        elif name == "ctl":
            ctl._request(words[1:])
        elif (parser := _parser_of(name)) is not None:
            parser.parse_args(words[1:])
        else:
            _refuse_early(_without_help(words), machine)
    except SystemExit as ended:  # --help, --version
        if ended.code:
            raise UsageError(f"{shlex.join(words)}: status {ended.code}") from None


def _parse_lab(words: list[str]) -> None:
    command = parse_lab(words)
    if command.help or command.is_program or command.options.kernel_selftests is not None:
        return
    if command.arguments[:1] == ["image"]:
        parse_request(command.arguments[1:])
        return
    host = hosts.named(command.options.host)
    parse(with_kernel(command.arguments, host), host.architecture.name)


def _parser_of(name: str) -> argparse.ArgumentParser | None:
    if not name.isidentifier() or importlib.util.find_spec(f"vmm.cli.{name}") is None:
        return None
    make = getattr(importlib.import_module(f"vmm.cli.{name}"), "parser", None)
    made = None if make is None or name == "measure" else make()  # `measure` takes a run's options
    assert made is None or isinstance(made, argparse.ArgumentParser)
    return made
